import signal
import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent("""
    import asyncio, sys
    from fedloom_common.signals import asked_to_end

    async def main():
        with asked_to_end() as asked:
            print("up", flush=True)
            await asked.wait()
            print("asked", flush=True)
            await asyncio.sleep(float(sys.argv[1]))
        print("in order", flush=True)

    asyncio.run(main())
""")


def start(seconds: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, seconds], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    return process


def test_the_first_signal_ends_a_service_in_order():
    process = start("0")
    output = process.stdout.read()  # not communicate: a part of it may lie in the buffer of readline

    assert (output, process.wait(60)) == ("in order\n", 0)
    process.stdout.close()
    process.stderr.close()


def test_a_second_signal_ends_it_at_once():
    process = start("1000")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)

    assert (output, process.returncode) == ("", -signal.SIGTERM)
    assert "a second signal" in errors
