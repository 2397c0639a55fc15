"""A simulated device that remembers what is in every page: a page handed out too early shows as a wrong token."""

import zlib
from collections import Counter, defaultdict, deque

import pytest

from flexjax.layout import PAGE_TOKENS, SlotLayout
from flexjax.request import Request, SamplingParams
from flexjax.scheduler import LatencyModel, Microbatch, Scheduler, UnitKind, policy_from_name

VOCABULARY = 50
LAYOUTS = tuple(
    SlotLayout(rows, chunk, tape=bool(chunk), dropout=bool(chunk), logprobs=True, prompt_logprobs=bool(chunk))
    for rows in (4, 16)
    for chunk in (0, 64, 256, 512)
)


def next_token(version: int, tokens) -> int:
    """What the simulated model samples after ``tokens``: any deterministic function of all of them."""
    return zlib.crc32(repr((version, tuple(tokens))).encode()) % VOCABULARY


def answer(request: Request) -> list[int]:
    """The outputs of a request served alone on an ideal machine."""
    tokens = list(request.prompt)
    while len(tokens) - len(request.prompt) < request.max_new_tokens:
        tokens.append(next_token(request.adapter_version, tokens))
        outputs = len(tokens) - len(request.prompt)
        if tokens[-1] in request.stop_token_ids and outputs >= request.sampling.min_tokens:
            break
    return tokens[len(request.prompt) :]


class Device:
    """Runs iterations on a memory of pages.

    A K/V position holds (version, position, token), a tape page its microbatch and block. Attention reads every
    position back through the page table and must find what the sequence once wrote there.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.memory = {}
        self.row_tokens = {}
        self.versions = {}
        self.adapters = {}
        self.microbatches = {}
        self.forwarded = defaultdict(list)
        self.unit_log = defaultdict(list)
        self.pulled = defaultdict(lambda: None)
        self.cancelled = set()
        self.computed = Counter()

    def run(self, iteration) -> dict[int, int]:
        layout = iteration.layout
        sampled = {}
        for slot in iteration.decode:
            assert slot.row < layout.rows
            token = self.row_tokens[slot.row]
            sampled[slot.row] = self._extend(slot.request_id, slot.pages, slot.position, [token])
        used_tiles = set()
        for part in iteration.prompts:
            assert part.row < layout.rows
            self._claim(used_tiles, layout, part)
            tokens = self.scheduler.tokens_of(part.request_id)[part.start : part.start + part.length]
            assert len(tokens) == part.length
            token = self._extend(part.request_id, part.pages, part.start, tokens)
            assert part.samples or part.length % PAGE_TOKENS == 0
            if part.samples:
                sampled[part.row] = token
        for part in iteration.windows:
            assert layout.tape
            self._claim(used_tiles, layout, part)
            self._forward(part)
        self.row_tokens.update(sampled)
        for unit in iteration.units:
            self._unit(unit)
        return sampled

    def _claim(self, used, layout, part):
        assert part.slot % PAGE_TOKENS == 0 and part.start % PAGE_TOKENS == 0 and part.length > 0
        tiles = set(range(part.slot // PAGE_TOKENS, -(-(part.slot + part.length) // PAGE_TOKENS)))
        assert not tiles & used and max(tiles) < layout.tiles
        used |= tiles

    def _extend(self, request_id, pages, start, tokens):
        version = self.versions[request_id]
        for position, token in enumerate(tokens, start):
            self.memory[pages[position // PAGE_TOKENS], position % PAGE_TOKENS] = (version, position, token)
            self.computed[request_id, position] += 1
        end = start + len(tokens)
        read = [self.memory[pages[at // PAGE_TOKENS], at % PAGE_TOKENS] for at in range(end)]
        assert [cell[:2] for cell in read] == [(version, at) for at in range(end)]
        return next_token(version, [cell[2] for cell in read])

    def _forward(self, part):
        microbatch = self.microbatches[part.microbatch]
        pages = self.scheduler.microbatch_pages(part.microbatch).blocks
        assert not self.unit_log[part.microbatch]
        before = [other for other in self.microbatches.values() if other.job == part.job and other.id < microbatch.id]
        closing = [other for other in before if other.closes_group and other.id not in self.cancelled]
        assert all(self.unit_log[other.id] == expected_units(other) for other in closing), "an update was crossed"
        first = part.block - part.start // PAGE_TOKENS
        for tile in range(-(-part.length // PAGE_TOKENS)):
            for page in pages[part.block + tile]:
                for offset in range(PAGE_TOKENS):
                    self.memory[page, offset] = ("tape", part.microbatch, part.block + tile)
        for block in range(first, part.block):
            self._read_block(part.microbatch, pages, block)
        assert part.start + part.length <= microbatch.lengths[part.sequence]
        self.forwarded[part.microbatch] += [(part.sequence, part.start + at) for at in range(part.length)]

    def _read_block(self, microbatch, pages, block):
        for page in pages[block]:
            assert self.memory[page, 0] == self.memory[page, 63] == ("tape", microbatch, block)

    def _unit(self, unit):
        microbatch = self.microbatches[unit.microbatch]
        expected = [(s, at) for s, length in enumerate(microbatch.lengths) for at in range(length)]
        assert self.forwarded[unit.microbatch] == expected
        if unit.kind is not UnitKind.UPDATE:
            pages = self.scheduler.microbatch_pages(unit.microbatch).blocks
            per_window = microbatch.window // PAGE_TOKENS
            for block in range(min(len(pages), (unit.window + 1) * per_window)):
                self._read_block(unit.microbatch, pages, block)
        log = self.unit_log[unit.microbatch]
        log.append((str(unit.kind), unit.layer, unit.window))
        assert self.pulled[unit.job] in (None, unit.microbatch), "two backward passes share a job's gradients"
        self.pulled[unit.job] = None if log == expected_units(microbatch) else unit.microbatch


def expected_units(microbatch: Microbatch) -> list[tuple[str, int, int]]:
    """The units of a microbatch, written down from the definition."""
    windows = -(-sum(-(-length // 64) * 64 for length in microbatch.lengths) // microbatch.window)
    units = [("loss", -1, window) for window in range(windows)]
    if microbatch.evaluation:
        return units
    for layer in reversed(range(microbatch.lowest_layer, microbatch.layers)):
        units += [("backward", layer, window) for window in reversed(range(windows))]
    return units + [("update", -1, -1)] * microbatch.closes_group


class Simulation:
    """A scheduler, a device and a clock. ``lag`` iterations are under way while the next is scheduled."""

    def __init__(
        self, policy="co_serve", pages=64, rows=8, lag=1, model_len=2000, caching=True, layouts=LAYOUTS, **opts
    ):
        if policy == "co_serve":
            opts = {"objective": 0.05} | opts
        self.latency = LatencyModel()
        self.scheduler = Scheduler(
            layouts, pages, rows, model_len, self.latency, policy_from_name(policy, **opts), caching
        )
        self.device = Device(self.scheduler)
        self.now = 0.0
        self.lag = lag
        self.flying = deque()
        self.history = []
        self.real = []
        self.outputs = defaultdict(list)
        self.reasons = {}
        self.requests = {}
        self.first_token_at = {}
        self.finished_microbatches = []
        self.tape_pages = {}
        self.uses = {}

    def request(self, prompt, new=8, **fields) -> Request:
        sampling = SamplingParams(**fields.pop("sampling", {}))
        request = Request(len(self.requests), tuple(prompt), sampling, new, arrival=self.now, **fields)
        self.scheduler.add_request(request)
        self.requests[request.id] = request
        self.device.versions[request.id] = request.adapter_version
        return request

    def microbatch(self, job="job", lengths=(100, 30), closes_group=True, **fields) -> bool:
        fields = {"window": 128, "layers": 4, "lowest_layer": 0, "pages_per_block": 3} | fields
        microbatch = Microbatch(len(self.device.microbatches), job, tuple(lengths), closes_group=closes_group, **fields)
        added = self.scheduler.try_add_microbatch(microbatch)
        if added:
            self.device.microbatches[microbatch.id] = microbatch
        return added

    def cancel_job(self, job):
        """The device forgets the job's microbatches that have not run all their units."""
        self.scheduler.cancel_job(job)
        self.device.cancelled |= {each.id for each in self.device.microbatches.values() if each.job == job}
        self.device.pulled.pop(job, None)

    def step(self, check=True):
        """Schedules and runs one iteration, and completes the oldest if more than ``lag`` are under way."""
        iteration = self.scheduler.schedule(self.now)
        for dropped in self.scheduler.dropped:
            assert not self.device.unit_log[dropped]
            self.device.forwarded[dropped].clear()
        if iteration is not None:
            self.require_budget(iteration)
            for part in iteration.windows:
                blocks = self.scheduler.microbatch_pages(part.microbatch).blocks
                self.tape_pages[part.microbatch] = tuple(page for block in blocks for page in block)
            self.require_fence(iteration)
            self.history.append(iteration)
            self.flying.append((iteration, self.device.run(iteration)))
        if self.flying and (iteration is None or len(self.flying) > self.lag):
            self.complete_one()
        if check:
            self.scheduler.check()
        return iteration

    def require_budget(self, iteration):
        """The plan keeps its limit, or is the least that may run: see ``Policy``."""
        if iteration.limit is None or iteration.predicted <= iteration.limit:
            return
        if not (iteration.decode or iteration.prompts):
            assert len(iteration.units) + bool(iteration.windows) == 1
        else:
            assert not iteration.windows and not iteration.units
        if iteration.prompts or iteration.windows:
            rows = max([part.row + 1 for part in iteration.prompts + iteration.decode], default=0)
            cheapest = min(
                self.latency.forward_seconds(layout, iteration.context_tokens)
                for layout in self.scheduler.layouts
                if layout.rows >= rows and layout.chunk and layout.tape >= bool(iteration.windows)
            )
            assert self.latency.forward_seconds(iteration.layout, iteration.context_tokens) == cheapest

    def require_fence(self, iteration):
        """While an iteration is under way its pages have no new owner, what it writes no other reader, and a request
        in it no new row."""
        reads, writes = self.uses[iteration.index] = self.pages_of(iteration)
        for earlier, _ in self.flying:
            earlier_reads, earlier_writes = self.uses[earlier.index]
            for page, owner in writes.items():
                assert earlier_reads[page] <= {owner}
            for page, owner in earlier_writes.items():
                assert reads[page] <= {owner}
            users = {slot.request_id for slot in earlier.decode + earlier.prompts}
            assert not users & set(iteration.admitted)

    def pages_of(self, iteration):
        """Who uses, and who writes, each page in an iteration."""
        reads, writes = defaultdict(set), {}
        for part in iteration.decode + iteration.prompts:
            for page in part.pages:
                reads[page].add(part.request_id)
        for slot in iteration.decode:
            writes[slot.pages[slot.position // PAGE_TOKENS]] = slot.request_id
        for part in iteration.prompts:
            writes |= dict.fromkeys(part.pages[part.start // PAGE_TOKENS :], part.request_id)
        for part in iteration.windows + iteration.units:
            known = self.tape_pages.get(part.microbatch, ())
            for page in known:
                reads[page].add(("tape", part.microbatch))
            writes |= dict.fromkeys(known, ("tape", part.microbatch))
        return reads, writes

    def complete_one(self):
        iteration, tokens = self.flying.popleft()
        seconds = self.cost(iteration)
        self.real.append(seconds)
        self.now += seconds
        completion = self.scheduler.complete(iteration, tokens, seconds)
        for request_id, token, reason in completion.tokens:
            self.first_token_at.setdefault(request_id, self.now)
            self.outputs[request_id].append(token)
            if reason is not None:
                assert request_id not in self.reasons
                self.reasons[request_id] = str(reason)
        assert set(completion.microbatches) <= {unit.microbatch for unit in iteration.units}
        self.finished_microbatches += completion.microbatches

    def drain(self, most=5000):
        """Runs until nothing is left; fails if that takes more than ``most`` iterations."""
        for _ in range(most):
            waited_for = len(self.flying)
            if self.step() is None and not waited_for:
                break
        assert self.scheduler.idle, "work is left, but nothing is scheduled"
        statistics = self.scheduler.statistics
        assert statistics.running == statistics.waiting == 0
        assert statistics.free_pages + statistics.cached_pages == statistics.pages

    def cost(self, iteration) -> float:
        """Real seconds; the latency model starts without any table."""
        seconds = 0.0005
        if iteration.layout is not None:
            seconds += 0.004 + 2e-5 * iteration.layout.slots + 1e-7 * iteration.context_tokens
        per_unit = {"loss": 0.001, "backward": 0.0015, "update": 0.002}
        return seconds + sum(per_unit[str(unit.kind)] for unit in iteration.units)

    def verify(self):
        """Every request not cancelled got its answer; every finished microbatch took its path exactly once."""
        for request_id, reason in self.reasons.items():
            assert self.outputs[request_id] == answer(self.requests[request_id]), request_id
            assert reason in ("stop", "length")
        for microbatch in self.finished_microbatches:
            assert self.device.unit_log[microbatch] == expected_units(self.device.microbatches[microbatch])

    @property
    def finetuned(self) -> int:
        """Finetuning tokens that went through a forward step."""
        return sum(iteration.finetuning_slots for iteration in self.history)


@pytest.fixture(scope="session")
def simulate():
    return Simulation


@pytest.fixture(scope="session")
def reference_answer():
    return answer


@pytest.fixture(scope="session")
def reference_units():
    return expected_units
