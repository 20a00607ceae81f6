"""Files that are no longer needed, kept to be overwritten.

A new file costs the kernel memory to be found and cleared for every page; overwriting one that is in
its cache takes half of the time, and on some systems a quarter.
"""

from pathlib import Path


class Spares:
    """A folder of files whose content is of no use."""

    def __init__(self, folder: Path, *, most: int) -> None:
        self._folder = folder
        self._most = most
        folder.mkdir(parents=True, exist_ok=True)
        self.clear()

    def keep(self, path: Path) -> None:
        """Take a file that is no longer needed, if it is there; the folder is on the same disk."""
        if not path.exists():
            return
        places = [self._folder / str(number) for number in range(self._most)]
        place = next((place for place in places if not place.exists()), None)
        if place is None:
            path.unlink()
        else:
            path.replace(place)

    def take(self) -> Path | None:
        """A file to overwrite, which the caller moves to its place."""
        return next(self._folder.iterdir(), None)

    def clear(self) -> None:
        """Give the disk space back."""
        for path in self._folder.iterdir():
            path.unlink()
