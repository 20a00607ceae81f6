import os

from fedloom_server.store import Store


def test_a_file_is_synced_before_it_takes_its_name_in_the_store(tmp_path, monkeypatch):
    synced = []

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)

    store, path = Store(tmp_path / "state"), tmp_path / "model"
    path.write_bytes(b"model")
    monkeypatch.setattr(os, "fsync", note)
    stored = store.files.put(path)
    folder = tmp_path / "state" / "files"
    assert synced == [store.files.path(stored.digest).stat().st_ino, folder.stat().st_ino]
    store.close()
