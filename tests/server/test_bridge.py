"""The way from the engine's thread to the event loop: nothing lost, in order, and few wake-ups."""

import asyncio
import threading

from flexjax.server.bridge import Bridge

COUNT = 5000


class Recorder:
    def __init__(self):
        self.taken = []

    def take(self, index, output, now):
        self.taken.append((index, output))


class CountingLoop:
    """An event loop of which only the wake-ups count."""

    def __init__(self, loop):
        self.wakeups, self._loop = 0, loop

    def call_soon_threadsafe(self, callback):
        self.wakeups += 1
        self._loop.call_soon_threadsafe(callback)


def test_nothing_is_lost_and_everything_is_in_order():
    async def receive():
        bridge, recorder = Bridge(), Recorder()
        bridge.open(asyncio.get_running_loop())
        sender = threading.Thread(target=lambda: [bridge.put(recorder, n % 7, n) for n in range(COUNT)])
        sender.start()
        while len(recorder.taken) < COUNT:
            await asyncio.sleep(0)  # looks as often as it can, so that the threads meet
        sender.join()
        return recorder.taken

    assert asyncio.run(receive()) == [(n % 7, n) for n in range(COUNT)]


def test_the_outputs_of_one_iteration_share_a_wake_up():
    async def receive():
        bridge, recorder, loop = Bridge(), Recorder(), CountingLoop(asyncio.get_running_loop())
        bridge.open(loop)
        for iteration in range(3):
            for row in range(500):
                bridge.put(recorder, row, iteration)  # the event loop cannot look in between
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return loop.wakeups, len(recorder.taken)

    assert asyncio.run(receive()) == (3, 1500)


def test_what_comes_after_the_event_loop_has_closed_is_dropped():
    bridge, recorder, loop = Bridge(), Recorder(), asyncio.new_event_loop()
    bridge.open(loop)
    loop.close()
    bridge.put(recorder, 0, "late")
    assert recorder.taken == []
