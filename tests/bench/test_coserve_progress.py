"""Lines about a replay, from counts made by hand."""

from types import SimpleNamespace

from flexjax.bench.coserve_progress import SHOWN_EVERY, Progress


def test_a_line_now_and_then():
    """The first when so much time has passed; each tells how things stand then."""
    lines, replay, tokens = [], SimpleNamespace(waiting=2, running=3, done=0), iter([0, 12_345])
    progress = Progress(replay, 40, lambda: next(tokens), lines.append)
    for elapsed in (0.0, 0.9 * SHOWN_EVERY, SHOWN_EVERY, 1.5 * SHOWN_EVERY):
        progress.tell(elapsed)
    replay.waiting, replay.running, replay.done = 0, 4, 31
    progress.tell(2.1 * SHOWN_EVERY)
    progress.tell(3.0 * SHOWN_EVERY)
    assert lines == [
        "  20 s: 2 wait, 3 run, 0 of 40 done; 0 finetuning tokens so far",
        "  42 s: 0 wait, 4 run, 31 of 40 done; 12,345 finetuning tokens so far",
    ]
