"""Shared contexts over fixed buffers (see helpers.evaluate.slots): a step in buckets of rows and columns, which a CUDA
graph can hold."""

from weakref import WeakKeyDictionary

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers import results
from helpers.evaluate.attention import dot_product
from helpers.evaluate.prefixes import Group
from helpers.evaluate.slots import COLUMN_MULTIPLE, Place, Row, Slots, round_up
from helpers.setup.device import capture_stream
from helpers.setup.layers import uncapturable

COLUMN_BUCKET = 512
LANES = 16  # of a slot at least: what its rows leave free is for their guesses
ROW_BUCKETS = (128, 1024)  # few, because capturing one costs as much as dozens of its steps
# Without cuDNN's: it builds a plan for each new shape, which takes as long as all steps of fifty dialogues.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# By model, the row buckets of which a step has run: the first one in a process loads kernels, which a capture may not.
WARM: WeakKeyDictionary = WeakKeyDictionary()


class OutOfColumns(Exception):
    """The buffers can't take another token; `StaticSlots.repack` makes room."""


class StaticSlots(Slots):
    """`slots` contexts of up to `columns` columns and `turns` rows each. Slot 0 is scratch: padding rows write
    there. A slot has a *lane* for each of its rows; a guessed token takes a free one.

    A step raises OutOfColumns before anything is changed. captured: steps run as CUDA graphs; `captures` counts them,
    `fallbacks` lists reasons why a step was not captured."""

    first = 1

    def __init__(self, model, slots: int, turns: int, columns: int, captured: bool = False):
        super().__init__(model, slots)
        self.lanes, self.columns = max(turns, LANES), round_up(columns, COLUMN_MULTIPLE)
        self.captured = captured
        if captured and (reason := uncapturable(model)):
            self.fallbacks.append(reason)
            self.captured = False
        self.graphs: dict = {}
        self.warm: set[int] = WARM.setdefault(model, set())
        self.pool = None
        shape = (self.count, self.columns, self.kv_heads, self.head_dim)
        # Given back at once, to be cut up for the layers: the driver takes long over each request, however large.
        torch.empty(2 * self.layers, *shape, dtype=self.dtype, device=self.device)
        # Zeros, not empty: a masked column has weight 0, and 0 times a leftover NaN would be NaN.
        self.cache = [tuple(self._zeros(*shape) for _ in range(2)) for _ in range(self.layers)]
        self.mask = self._closed(self.count, self.group, self.lanes, self.columns)
        self.mask[0] = 0
        self.positions = self._zeros(self.count, self.columns, dtype=torch.long)  # of a column's token
        self.visible = self._zeros()
        self.buffers: dict = {}

    def _storing(self, groups, slots, starts):
        lengths = torch.tensor([group.columns for group in groups])
        columns = torch.cat([torch.arange(length) for length in lengths])
        where = torch.tensor(slots).repeat_interleave(lengths).to(self.device), columns.to(self.device)
        positions = torch.tensor([position for group in groups for position in group.positions])
        self.positions.index_put_(where, positions.to(self.device))

        def store(layer, key, value):
            for cache, new in zip(self.cache[layer], (key, value), strict=True):
                cache.index_put_(where, new)

        return store

    def _open(self, slots: list[int], groups: list[Group]) -> None:
        opened = torch.stack([self._opened(group, self.lanes, self.columns) for group in groups])
        self.mask[torch.tensor(slots, device=self.device)] = opened[:, None]

    def repack(self, keep: list[int], columns: int, rows: list[Row]) -> dict[int, int]:
        """Keep these slots and no others, with room for `columns` columns; returns where each went, and tells its
        `rows`. Graphs are captured anew."""
        kept, columns = [*range(self.first), *keep], round_up(columns, COLUMN_MULTIPLE)
        width = min(columns, self.columns)
        # A memory pool is gone with the last of its graphs; a capture into it would fail.
        self.graphs.clear()
        self.pool = None
        for layer, pair in enumerate(self.cache):
            moved = tuple(self._zeros(len(kept), columns, self.kv_heads, self.head_dim) for _ in pair)
            for old, new in zip(pair, moved, strict=True):
                for to, slot in enumerate(kept):
                    new[to, :width] = old[slot, :width]
            self.cache[layer] = moved
            del pair
        mask = self._closed(len(kept), *self.mask.shape[1:3], columns)
        for to, slot in enumerate(kept):
            mask[to, ..., :width] = self.mask[slot, ..., :width]
        mask[0] = 0
        self.mask = mask
        positions = self._zeros(len(kept), columns, dtype=torch.long)
        positions[:, :width] = self.positions[kept, :width]
        self.positions = positions
        self.used = [self.used[slot] for slot in kept]
        self.count, self.columns = len(kept), columns
        places = {slot: to for to, slot in enumerate(kept)}
        for row in rows:
            row.slot = places[row.slot]
        return places

    def _make_room(self, end: list[int]) -> None:
        if max(end) > self.columns:
            raise OutOfColumns

    def _lanes(self, rows, drafts) -> list[list[int]]:
        """A lane of its own for each guess, as long as its slot has free ones."""
        taken, free, found = {(row.slot, row.turn) for row in rows}, {}, []
        for row, draft in zip(rows, drafts, strict=True):
            if draft and row.slot not in free:
                free[row.slot] = [lane for lane in range(self.lanes) if (row.slot, lane) not in taken]
            found.append([free[row.slot].pop() for _ in draft[: len(free[row.slot])]] if draft else [])
        return found

    def _run(self, parts: list[list[Place]]) -> list[int]:
        self._lend(parts)
        return self._static_step([place for part in parts for place in part])

    def _keep(self, parts: list[list[Place]]) -> None:
        # The step itself has shown a row its first token.
        self._show([(part[0].slot, part[0].lane, place.column) for part in parts for place in part[1:]])

    def _lend(self, parts: list[list[Place]]) -> None:
        """Let the lanes of guesses see what their row sees, and the tokens of their row that stand before them."""
        pairs = [(part[0].slot, part[0].lane, place.lane) for part in parts for place in part[1:]]
        if pairs:
            slot, own, lent = torch.tensor(pairs).to(self.device).unbind(1)
            self.mask[slot, :, lent] = self.mask[slot, :, own]
        self._show(
            [(p.slot, p.lane, before.column) for part in parts for n, p in enumerate(part) for before in part[:n]]
        )

    def _show(self, places: list[tuple[int, int, int]]) -> None:
        """Make columns visible: (slot, lane, column)."""
        if places:
            self._open_columns(*torch.tensor(places).to(self.device).unbind(1))

    def _open_columns(self, slot, lane, column) -> None:
        self.mask.permute(0, 2, 3, 1).index_put_((slot, lane, column), self.visible)

    def _key(self, tokens: int, columns: int) -> tuple[int, int]:
        """The shape of a step that runs so many tokens over so many columns."""
        count = next((n for n in ROW_BUCKETS if n >= tokens), round_up(tokens, ROW_BUCKETS[-1]))
        if count not in self.buffers:
            self.buffers[count] = self._zeros(5, count, dtype=torch.long), self._zeros(count, dtype=torch.long)
        return count, min(round_up(columns, COLUMN_BUCKET), self.columns)

    def _meanwhile(self, rows: int, columns: int) -> None:
        self._capture_if_warm(self._key(rows, columns))

    def _static_step(self, places: list[Place]) -> list[int]:
        key = self._key(len(places), max(p.column for p in places) + 1)
        inputs, output = self.buffers[key[0]]
        host = torch.zeros(*inputs.shape, dtype=torch.long)  # what is left over are padding rows: slot 0, column 0
        host[:, : len(places)] = torch.tensor(places).T
        inputs.copy_(host)
        self._capture_if_warm(key)
        if key in self.graphs:
            self.graphs[key].replay()
        else:
            self._static_forward(*key)
            self.warm.add(key[0])
        return output[: len(places)].tolist()

    def _static_forward(self, count: int, width: int) -> None:
        """One step for `count` rows over all slots' first `width` columns; reads and writes fixed buffers only."""
        inputs, output = self.buffers[count]
        slot, lane, column, ids, positions = inputs.unbind(0)
        self._open_columns(slot, lane, column)
        self.positions.index_put_((slot, column), positions)
        masks: dict = {}

        def mask(window):
            if window not in masks:
                seen = self.mask[..., :width]
                if window is not None:
                    now = self._zeros(self.count, self.lanes, dtype=torch.long)
                    now.index_put_((slot, lane), positions)
                    back = now[:, None, :, None] - self.positions[:, None, None, :width]
                    seen = seen.masked_fill(back >= window, -torch.inf)
                seen = seen.reshape(self.count, 1, self.group * self.lanes, width)
                masks[window] = seen.expand(-1, self.kv_heads, -1, -1)
            return masks[window]

        place = slot * self.lanes + lane

        def attend(layer, query, key, value, kind):
            keys, values = self.cache[layer]
            keys.index_put_((slot, column), key[0].transpose(0, 1))
            values.index_put_((slot, column), value[0].transpose(0, 1))
            padded = query.new_empty(self.count * self.lanes, self.heads, self.head_dim)
            padded.index_copy_(0, place, query[0].transpose(0, 1))
            padded = padded.view(self.count, self.lanes, self.kv_heads, self.group, self.head_dim).permute(
                0, 2, 3, 1, 4
            )
            padded = padded.reshape(self.count, self.kv_heads, self.group * self.lanes, self.head_dim)
            seen = keys[:, :width].transpose(1, 2), values[:, :width].transpose(1, 2)
            sinks = None
            if kind.sinks is not None:
                sinks = kind.sinks.view(self.kv_heads, self.group).repeat_interleave(self.lanes, 1)
            mixed = dot_product(padded, *seen, mask(kind.window), kind, sinks)
            mixed = mixed.view(self.count, self.kv_heads, self.group, self.lanes, self.head_dim).permute(0, 3, 1, 2, 4)
            return mixed.reshape(self.count * self.lanes, self.heads, self.head_dim).index_select(0, place)[None]

        with sdpa_kernel(KERNELS):
            output.copy_(self._likeliest(self._forward(ids, positions, attend)))

    def _capture_if_warm(self, key) -> None:
        if self.captured and key[0] in self.warm and key not in self.graphs:
            self._capture(key)

    def _capture(self, key) -> None:
        """Record the step as a CUDA graph; a failure is kept with its reason, and steps run eagerly from then on."""
        try:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Not `torch.cuda.graph`: it would wait for the GPU and give its free memory back before it begins.
            with torch.cuda.stream(capture_stream(self.device)):
                graph.capture_begin(pool=self.pool)
                try:
                    self._static_forward(*key)
                finally:
                    graph.capture_end()
            self.graphs[key] = graph
            self.captures += 1
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.fallbacks.append(f"CUDA graph: {results.first_line(error)}")
            self.captured = False
            self.graphs.clear()
