"""Runs PTX of one CTA in NumPy: the part of the language that our texts without a Pallas interpreter are written in.

Warps run one after the other, in any order, from barrier to barrier; the threads of a warp take a step at a time. Those
that branch forward, where others do not, wait there for the others. Shared memory is watched (`ptx_shared_memory.py`).
Registers hold anything before they are written, and so does memory. A copy by `cp.async` lands when it is waited for,
and is then a write of the thread that asked for it.
"""

import collections
import operator
import re

import ml_dtypes
import numpy as np

from tests.gpu.ptx_shared_memory import SharedMemory

_COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_CTA = 1 << 24  # from the shared memory of a CTA to that of the next
_INTEGER = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "mul": np.multiply}
_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_TYPES = {
    "s32": np.int32,
    "u32": np.uint32,
    "b32": np.uint32,
    "f32": np.float32,
    "s64": np.int64,
    "u64": np.int64,
    "b64": np.int64,
}


class Machine:
    """A CTA of n threads.

    Args:
        text: PTX, whose operands are registers that `operands` gives to all threads, addresses as bytes.
        memory: [words] uint32, device memory; `smem_bytes`: of shared memory, which begins with anything.
    """

    def __init__(self, text, n, operands, memory, smem_bytes, seed=0, cta=0):
        self.n, self.memory, self.rng = n, memory, np.random.default_rng(seed)
        self.first_thread, self.cluster = cta * n, [self]
        self.shared = SharedMemory(self.anything(smem_bytes // 4), range(cta * n, (cta + 1) * n))
        self.code, self.labels = self._parsed(text)
        self.warps = [_Warp(self, first, operands) for first in range(0, n, 32)]
        self.n_barriers = 0
        self.arrivals: collections.Counter = collections.Counter()  # at mbarriers, by address

    @property
    def smem(self):
        """Words of shared memory, unwatched."""
        return self.shared.words

    @property
    def steps(self):
        """Of the warp that took most."""
        return max(warp.steps for warp in self.warps)

    def run(self):
        """To the end, or to a barrier of the cluster: whether to that."""
        while True:
            at_barrier = {self.warps[i].run() for i in self.rng.permutation(len(self.warps))}
            assert len(at_barrier) == 1, "some warps end before a barrier of others"
            which = at_barrier.pop()
            if which != "cta":
                return which == "cluster"
            self.n_barriers += 1
            self.shared.forget_own()

    def anything(self, n):
        return self.rng.integers(0, 2**32, n, dtype=np.uint32)

    @staticmethod
    def _parsed(text):
        code, labels = [], {}
        for line in re.sub(r"//[^\n]*|\.pragma[^;]*;", "", text).strip().removeprefix("{").removesuffix("}").split(";"):
            statement = line.strip()
            while label := re.match(r"(\w+):\s*", statement):
                labels[label[1]] = len(code)
                statement = statement[label.end() :]
            if statement and not statement.startswith(".reg"):
                guard = re.match(r"@(!?)(\w+)\s+", statement)
                op, _, rest = statement[guard.end() if guard else 0 :].partition(" ")
                code.append(
                    (guard and (guard[1] == "!", guard[2]), op, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest))
                )
        return code, labels


class Cluster:
    """CTAs that run the same text, each from barrier to barrier in turn, in any order.

    Args: those of `Machine`; `n_ctas`.
    """

    def __init__(self, n_ctas, *args, seed=0):
        self.ctas = [Machine(*args, seed=seed + i, cta=i) for i in range(n_ctas)]
        self.rng, self.n_barriers = np.random.default_rng(seed), 0
        for cta in self.ctas:
            cta.cluster = self.ctas

    def run(self):
        while True:
            at_barrier = {self.ctas[i].run() for i in self.rng.permutation(len(self.ctas))}
            assert len(at_barrier) == 1, "some CTAs end before a barrier of others"
            if not at_barrier.pop():
                return
            self.n_barriers += 1
            for cta in self.ctas:
                cta.shared.forget()


class _Warp:
    def __init__(self, cta, first, operands):
        self.cta, self.n, self.at, self.steps = cta, 32, 0, 0
        self.in_flight = [[]]  # products, by group
        self.active, self.waiting = np.ones(32, bool), {}  # by place, threads that branched there
        self.copies = [[]]  # asked for and not waited for, by group
        self.threads = cta.first_thread + first + np.arange(32)
        self.registers = {name: np.full(32, value, np.int64) for name, value in operands.items()}
        self.registers |= {"%tid.x": first + np.arange(32), "%smid": np.full(32, 131)}
        self.registers |= {"%cluster_ctarank": np.full(32, cta.first_thread // cta.n)}
        self.registers |= {"%laneid": np.arange(32), "%lanemask_lt": (1 << np.arange(32)) - 1}

    def run(self, most=100_000):
        """To the next barrier, or to the end: whose barrier, "cta" or "cluster", or None."""
        while self.at < len(self.cta.code):
            self.steps += 1
            assert self.steps < most, "it does not end"
            guard, op, args = self.cta.code[self.at]
            self.active = self.active | self.waiting.pop(self.at, False)
            mask = self.active
            if guard:
                mask = mask & (self.registers[guard[1]] != guard[0])
            self.at += 1
            name, *parts = op.split(".")
            if name == "bra":
                target = self.cta.labels[args[0]]
                if (mask == self.active).all():
                    self.at = target
                elif mask.any():
                    assert target >= self.at, f"threads part at a branch back to {args[0]}"
                    self.waiting[target] = mask | self.waiting.get(target, False)
                    self.active = self.active & ~mask
            elif name == "bar" and parts[0] == "warp":
                assert self.active.all()
                if self.cta.n == 32:  # or other warps go on
                    self.cta.shared.forget_own()
            elif name == "bar":
                assert self.active.all()
                assert int(args[1]) == self.cta.n
                return "cta"
            elif name == "barrier" and parts[1] == "arrive":
                assert self.active.all()
            elif name == "barrier":
                return "cluster"
            elif name == "wgmma":
                self._multiply(op, args)
            elif name == "fence":
                pass
            else:
                self._step(name, parts, args, mask)
        return None

    def _value(self, arg, kind):
        if arg.startswith("0f"):
            return np.full(self.n, np.uint32(int(arg[2:], 16)).view(np.float32))
        if re.fullmatch(r"-?\d+|0x[0-9a-f]+", arg):
            return np.full(self.n, int(arg, 0), np.int64).astype(_TYPES[kind])
        if arg not in self.registers:
            self.registers[arg] = self.cta.anything(self.n)
        value = self.registers[arg]
        if value.dtype == bool:
            return value
        if kind == "f32":
            return value if value.dtype == np.float32 else value.astype(np.uint32).view(np.float32)
        if value.dtype == np.float32:
            value = value.view(np.uint32)
        return value.astype(_TYPES[kind])

    def _set(self, name, value, mask):
        old = self.registers.get(name)
        if old is None or mask.all():
            old = value
        elif old.dtype != value.dtype:
            old = self._value(name, {v: k for k, v in _TYPES.items()}[value.dtype.type])
        self.registers[name] = np.where(mask, value, old)

    def _step(self, name, parts, args, mask):
        kind = parts[-1] if parts else ""
        if name == "setp":
            value = _COMPARE[parts[0]](self._value(args[1], kind), self._value(args[2], kind))
            if parts[1] in ("and", "or"):
                value = {"and": np.logical_and, "or": np.logical_or}[parts[1]](value, self.registers[args[3]])
            self._set(args[0], value, mask)
        elif kind == "pred" and name != "vote":
            self._set(
                args[0],
                {"and": np.logical_and, "or": np.logical_or}[name](*(self.registers[x] for x in args[1:])),
                mask,
            )
        elif name == "mapa":
            self._set(args[0], self._value(args[1], "u32") + _CTA * (1 + self._value(args[2], "u32")), mask)
        elif name in ("ld", "st"):
            self._move(name, parts, args, mask)
        elif name in ("red", "atom"):
            self._add(args, mask, returns=name == "atom")
        elif name == "redux":
            assert mask.all()
            value = self._value(args[1], kind)
            self._set(args[0], np.full(32, _INTEGER[parts[1]].reduce(value, dtype=value.dtype)), mask)
        elif name == "vote":
            votes = self.registers[args[1]]
            is_ballot = parts[1] == "ballot"
            value = np.uint32(np.packbits(votes, bitorder="little").view(np.uint32)[0]) if is_ballot else votes.any()
            self._set(args[0], np.full(32, value), mask)
        elif name == "cp":
            self._copy(parts, args, mask)
        elif name == "mbarrier" and parts[0] == "try_wait":
            self._set(args[0], np.ones(32, bool), mask)  # what is copied is there from the start
        elif name == "mbarrier":
            self._arrive(next(x for x in args if x.startswith("[")), mask)
        elif name == "ldmatrix":
            self._load_matrices(args)
        elif name in ("fence", "createpolicy"):
            pass
        elif name == "shfl" and parts[1] == "idx":
            self._set(args[0], self._value(args[1], "b32")[self._value(args[2], "u32") & 31], mask)
        elif name == "shfl":
            lane, by = np.arange(32), int(args[2])
            value = self._value(args[1], "b32")
            if parts[1] == "bfly":
                self._set(args[0], value[lane ^ by], mask)
                return
            out, ok = args[0].split("|")
            self._set(out, np.where(lane >= by, np.roll(value, by), value), mask)
            self._set(ok, lane >= by, mask)
        elif name == "cvt" and "bf16x2" in parts:
            high, low = (self._value(arg, "f32").astype(ml_dtypes.bfloat16) for arg in args[1:])
            self._set(args[0], _joined(high, low), mask)
        elif name == "cvt":
            x = np.nan_to_num(np.trunc(self._value(args[1], "f32").astype(np.float64)), nan=0.0)
            self._set(args[0], np.clip(x, 0, 2**32 - 1).astype(np.uint32), mask)
        else:
            self._set(args[0], self._arithmetic(name, parts, args, kind), mask)

    def _arithmetic(self, name, parts, args, kind):
        with np.errstate(all="ignore"):
            if name == "mul" and parts[0] == "wide":
                return self._value(args[1], kind).astype(np.int64) * self._value(args[2], kind).astype(np.int64)
            if name == "bfind":
                return np.array([int(x).bit_length() - 1 for x in self._value(args[1], "u32")], np.int64).astype(
                    np.uint32
                )
            if name in ("mad", "fma"):
                wide = np.int64 if parts[0] == "wide" else np.float64 if name == "fma" else _TYPES[kind]
                a, b = (self._value(arg, kind).astype(wide) for arg in args[1:3])
                if name == "fma" and parts[0] == "rm":
                    exact = a * b + self._value(args[3], kind)
                    near = exact.astype(np.float32)
                    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
                return (a * b + self._value(args[3], "s64" if wide is np.int64 else kind)).astype(
                    np.float32 if name == "fma" else wide
                )
            if name == "mov" and args[1].startswith("{"):
                low, high = (self._value(word, "u32").astype(np.int64) for word in re.findall(r"\w+", args[1]))
                return low | high << 32
            if name == "neg":
                return -self._value(args[1], kind)
            if name == "not":
                return ~self._value(args[1], kind)
            if name == "popc":
                return np.bitwise_count(self._value(args[1], "u32")).astype(np.uint32)
            if name == "max" and kind == "f32":
                return (np.maximum if "NaN" in parts else np.fmax)(*(self._value(arg, kind) for arg in args[1:]))
            if name == "prmt":
                return _permuted(*(self._value(arg, "u32") for arg in args[1:]))
            if name == "lop3":
                a, b, c = (self._value(arg, "u32") for arg in args[1:4])
                table = int(args[4], 0)
                chosen = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8)]
                return np.bitwise_or.reduce([x for i, x in enumerate(chosen) if table >> i & 1])
            if kind == "bf16x2":
                a, b = (self._value(arg, "u32").view(ml_dtypes.bfloat16).astype(np.float32) for arg in args[1:])
                return {"mul": np.multiply}[name](a, b).astype(ml_dtypes.bfloat16).view(np.uint32)
            if name == "mov":
                return self._value(args[1], kind)
            if name == "selp":
                return np.where(self.registers[args[3]], self._value(args[1], kind), self._value(args[2], kind))
            a, b = self._value(args[1], kind), self._value(args[2], "u32" if name in ("shl", "shr") else kind)
            if name == "shl":
                return np.where(b < 32, a << np.minimum(b, 31), 0).astype(a.dtype)
            if name == "shr":
                return a >> b.astype(a.dtype)
            if name == "div":
                return a / b
            return (_INTEGER | _BITS)[name](a, b)

    def _multiply(self, op, args):
        """Products of 8-bit registers and shared memory, the part of one warp: made when they are waited for."""
        if "mma_async" in op:
            n, (sums, codes, desc, adds) = int(re.search(r"m64n(\d+)k32\.f32\.e4m3\.e4m3", op)[1]), args[:4]
            registers = (re.findall(r"\w+", x) for x in (sums, codes))
            self.in_flight[-1].append((n, *registers, int(self.registers[desc][0]), bool(self.registers[adds].all())))
        elif "commit_group" in op:
            self.in_flight.append([])
        elif "wait_group" in op:
            while len(self.in_flight) - 1 > int(args[0]):
                for product in self.in_flight.pop(0):
                    self._multiply_one(*product)

    def _multiply_one(self, n, sums, codes, desc, adds):
        g, c, e4m3 = np.arange(32) // 4, np.arange(32) % 4, ml_dtypes.float8_e4m3fn
        a = np.zeros((16, 32), np.uint8)
        for i, name in enumerate(codes):
            a.reshape(16, 8, 4)[g + 8 * (i % 2), c + 4 * (i // 2)] = (
                self._value(name, "u32").view(np.uint8).reshape(32, 4)
            )
        # Columns are rows of 128 bytes, eight of them a tile whose chunks of 16 bytes are swizzled.
        assert desc >> 62 & 3 == 1, "another swizzle"
        column, byte = np.arange(n)[:, None], np.arange(32)[None, :]
        at = ((desc & 0x3FFF) << 4) + (column // 8) * ((desc >> 32 & 0x3FFF) << 4) + column % 8 * 128 + byte
        b = self.cta.smem.view(np.uint8)[at ^ ((at >> 7 & 7) << 4)]
        product = a.view(e4m3).astype(np.float64) @ b.view(e4m3).astype(np.float64).T
        for i, name in enumerate(sums):
            row, own = g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * c + i % 2
            before = self._value(name, "f32") if adds else 0
            self.registers[name] = (before + product[row, own]).astype(np.float32)

    def _load_matrices(self, args):
        """Four of 8 rows of 16 bytes: lane 8 * i + r has the address of row r of matrix i."""
        at = self._words(args[1])
        assert (at % 16 == 0).all(), "not aligned"
        for i, name in enumerate(re.findall(r"\w+", args[0])):
            words = at[8 * i + np.arange(32) // 4] // 4 + np.arange(32) % 4
            self._set(name, self.cta.shared.read(self.threads, words), np.ones(32, bool))

    def _words(self, address):
        base, _, offset = address.strip("[]").partition("+")
        at = self._value(base, "s64") + int(offset or 0)
        return at

    def _move(self, name, parts, args, mask):
        where, vector = args if name == "st" else args[::-1]
        names = re.findall(r"\w+", vector) if vector.startswith("{") else [vector]
        at, is_shared, owner = self._words(where), "shared" in parts, self.cta
        if "shared::cluster" in parts:
            # Of each CTA in turn.
            is_shared = True
            whose = at // _CTA - 1
            assert ((whose[mask] >= 0) & (whose[mask] < len(self.cta.cluster))).all(), f"of no CTA: {args}"
            if len(set(whose[mask])) > 1:
                for cta in sorted(set(whose[mask])):
                    self._move(name, parts, args, mask & (whose == cta))
                return
            if not mask.any():
                return
            owner, at = self.cta.cluster[whose[mask][0]], at % _CTA
        assert (at[mask] % (4 * len(names)) == 0).all(), "not aligned"
        memory = owner.smem if is_shared else self.cta.memory
        assert ((at[mask] >= 0) & (at[mask] // 4 + len(names) <= len(memory))).all(), f"outside of memory: {args}"
        for i, register in enumerate(names):
            words = np.where(mask, at // 4 + i, 0)
            if name == "ld":
                if is_shared:
                    owner.shared.read(self.threads[mask], words[mask])
                self._set(register, memory[words], mask)
            elif is_shared:
                owner.shared.write(self.threads[mask], words[mask], self._value(register, "b32")[mask])
            else:
                memory[words[mask]] = self._value(register, "b32")[mask]

    def _copy(self, parts, args, mask):
        """Of 16 bytes a thread, zeros where a predicate says so; or what becomes of such copies."""
        if parts[1] == "mbarrier":
            self._arrive(args[0], mask)
        elif parts[1] == "commit_group":
            self.copies.append([])
        elif parts[1] in ("wait_group", "wait_all"):
            # The last list is of those that are in no group yet.
            n = len(self.copies) - 1 - int(args[0]) if args else len(self.copies)
            landed, self.copies = self.copies[:n], self.copies[n:] or [[]]
            for words, mask, values in (copy for group in landed for copy in group):
                for i, own in enumerate(values):
                    self.cta.shared.write(self.threads[mask], (words + i)[mask], own[mask])
        else:
            size = int(args[2])
            to, source = (self._words(arg) for arg in args[:2])
            ignored = self.registers[args[3]] if len(args) > 3 else np.zeros(32, bool)
            assert (to[mask] % size == 0).all() and (source[mask & ~ignored] % size == 0).all(), "not aligned"
            is_inside = (to >= 0) & (to + size <= 4 * len(self.cta.smem))
            assert is_inside[mask].all(), f"outside of memory: {args}"
            at = np.where(ignored | ~mask, 0, source // 4)
            assert ((at >= 0) & (at + size // 4 <= len(self.cta.memory))).all(), f"outside of memory: {args}"
            values = [np.where(ignored, 0, self.cta.memory[at + i]).astype(np.uint32) for i in range(size // 4)]
            self.copies[-1].append((np.where(mask, to // 4, 0), mask, values))

    def _arrive(self, where, mask):
        for address in self._words(where)[mask]:
            self.cta.arrivals[int(address)] += 1

    def _add(self, args, mask, *, returns):
        where, amount = args[-2:]
        threads = self.cta.rng.permutation(np.flatnonzero(mask))  # in any order
        before = np.zeros(self.n, np.uint32)
        before[threads] = self.cta.shared.add((self._words(where) // 4)[threads], self._value(amount, "u32")[threads])
        if returns:
            self._set(args[0], before, mask)


def _joined(high, low):
    """Two arrays of 16 bits -> one of 32."""
    return (high.view(np.uint16).astype(np.uint32) << 16) | low.view(np.uint16)


def _permuted(a, b, selector):
    """Bytes of a and then b, by a selector's digits."""
    both = (b.astype(np.uint64) << 32) | a
    byte = [both >> (8 * (selector >> 4 * i & 7).astype(np.uint64)) & 0xFF for i in range(4)]
    return np.bitwise_or.reduce([x << np.uint64(8 * i) for i, x in enumerate(byte)]).astype(np.uint32)
