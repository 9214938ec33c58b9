"""What is written in a thread of its own: in order, little of it waiting, and its first error told."""

import threading

import pytest

from parallel_backend.cli.writer import Writer


def test_one_waits_while_one_is_written_and_who_brings_a_third_waits_too():
    go_on, done, brought = threading.Event(), [], []

    def bring(writer: Writer) -> None:
        for place in range(4):
            writer.add(lambda place=place: (go_on.wait(30), done.append(place)))
            brought.append(place)

    with Writer() as writer:
        thread = threading.Thread(target=bring, args=(writer,))
        thread.start()
        thread.join(0.3)
        first, written = list(brought), list(done)
        go_on.set()
        thread.join(30)
    assert (first, written) == ([0, 1], [])
    assert done == [0, 1, 2, 3]


def test_the_first_error_is_raised_and_what_comes_after_it_is_left_out():
    done = []

    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        with Writer() as writer:
            writer.add(fail)
            writer.add(lambda: done.append(1))
    assert not done
    with pytest.raises(OSError, match="full"):
        with Writer() as writer:
            writer.add(fail)
            for _ in range(3):  # at the latest the third waits until the first has failed
                writer.add(lambda: done.append(1))
    assert not done
    with pytest.raises(ValueError, match="else"):  # what ends the caller is not hidden
        with Writer() as writer:
            writer.add(fail)
            raise ValueError("something else")
