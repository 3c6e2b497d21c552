"""Runs PTX of one CTA in NumPy: the part of the language that our texts without a Pallas interpreter are written in.

All threads take a step at a time, so branches must be taken by all or by none. Shared memory is watched: what a thread
has written, or another one reads, since the last barrier may not be touched by others, but for atomics among
themselves. Registers hold anything before they are written, and so does memory.
"""

import operator
import re

import numpy as np

_COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
_INTEGER = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "mul": np.multiply}
_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_TYPES = {"s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32, "s64": np.int64, "b64": np.int64}
_ATOMIC = -2  # in place of a thread


class Race(AssertionError):
    """Two threads at one word of shared memory without a barrier between them."""


class Machine:
    """A CTA of n threads.

    Args:
        text: PTX, whose operands are registers that `operands` gives to all threads, addresses as bytes.
        memory: [words] uint32, device memory; `smem_bytes`: of shared memory, which begins with anything.
    """

    def __init__(self, text, n, operands, memory, smem_bytes, seed=0):
        self.n, self.memory, self.rng = n, memory, np.random.default_rng(seed)
        self.smem = self._anything(smem_bytes // 4)
        self.written_by, self.read_by = (np.full(len(self.smem), -1) for _ in range(2))
        self.code, self.labels = self._parsed(text)
        self.registers = {name: np.full(n, value, np.int64) for name, value in operands.items()}
        self.registers["%tid.x"] = np.arange(n)
        self.registers["%laneid"] = np.arange(n) % 32
        self.n_barriers = self.steps = 0

    def _anything(self, n):
        return self.rng.integers(0, 2**32, n, dtype=np.uint32)

    @staticmethod
    def _parsed(text):
        code, labels = [], {}
        for line in re.sub(r"//[^\n]*", "", text).strip().removeprefix("{").removesuffix("}").split(";"):
            statement = line.strip()
            while label := re.match(r"(\w+):\s*", statement):
                labels[label[1]] = len(code)
                statement = statement[label.end() :]
            if statement and not statement.startswith(".reg"):
                guard = re.match(r"@(!?)(\w+)\s+", statement)
                op, _, rest = statement[guard.end() if guard else 0 :].partition(" ")
                code.append((guard and (guard[1] == "!", guard[2]), op, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)))
        return code, labels

    def run(self, most=200_000):
        at = 0
        while at < len(self.code):
            self.steps += 1
            assert self.steps < most, "it does not end"
            guard, op, args = self.code[at]
            mask = np.ones(self.n, bool)
            if guard:
                mask = self.registers[guard[1]] != guard[0]
            at += 1
            name, *parts = op.split(".")
            if name == "bra":
                assert mask.all() or not mask.any(), f"threads part at a branch to {args[0]}"
                at = self.labels[args[0]] if mask.all() else at
            elif name == "bar":
                assert int(args[1]) == self.n
                self.n_barriers += 1
                self.written_by[:], self.read_by[:] = -1, -1
            else:
                self._step(name, parts, args, mask)

    def _value(self, arg, kind):
        if arg.startswith("0f"):
            return np.full(self.n, np.uint32(int(arg[2:], 16)).view(np.float32))
        if re.fullmatch(r"-?\d+", arg):
            return np.full(self.n, int(arg), np.int64).astype(_TYPES[kind])
        if arg not in self.registers:
            self.registers[arg] = self._anything(self.n)
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
            if parts[1] == "and":
                value = value & self.registers[args[3]]
            self._set(args[0], value, mask)
        elif kind == "pred":
            self._set(args[0], {"and": np.logical_and, "or": np.logical_or}[name](*(self.registers[x] for x in args[1:])), mask)
        elif name in ("ld", "st"):
            self._move(name, parts, args, mask)
        elif name in ("red", "atom"):
            self._add(args, mask, returns=name == "atom")
        elif name == "redux":
            warps = np.ascontiguousarray(self._value(args[1], kind)).reshape(-1, 32)
            ufunc = _INTEGER[parts[1]]
            self._set(args[0], np.repeat(ufunc.reduce(warps, axis=1, dtype=warps.dtype), 32), mask)
        elif name == "shfl":
            out, ok = args[0].split("|")
            lane, by = np.arange(self.n) % 32, int(args[2])
            value = self._value(args[1], "b32")
            self._set(out, np.where(lane >= by, np.roll(value, by), value), mask)
            self._set(ok, lane >= by, mask)
        elif name == "cvt":
            x = np.nan_to_num(np.trunc(self._value(args[1], "f32").astype(np.float64)), nan=0.0)
            self._set(args[0], np.clip(x, 0, 2**32 - 1).astype(np.uint32), mask)
        else:
            self._set(args[0], self._arithmetic(name, parts, args, kind), mask)

    def _arithmetic(self, name, parts, args, kind):
        with np.errstate(all="ignore"):
            if name == "mul" and parts[0] == "wide":
                return self._value(args[1], kind).astype(np.int64) * self._value(args[2], kind).astype(np.int64)
            if name == "mov":
                return self._value(args[1], kind)
            if name == "selp":
                return np.where(self.registers[args[3]], self._value(args[1], kind), self._value(args[2], kind))
            a, b = self._value(args[1], kind), self._value(args[2], "u32" if name in ("shl", "shr") else kind)
            if name == "shl":
                return a << b
            if name == "shr":
                return a >> b.astype(a.dtype)
            if name == "div":
                return a / b
            if name == "mad":
                return a * b + self._value(args[3], kind)
            return (_INTEGER | _BITS)[name](a, b)

    def _words(self, address):
        base, _, offset = address.strip("[]").partition("+")
        at = self._value(base, "s64") + int(offset or 0)
        return at

    def _move(self, name, parts, args, mask):
        where, vector = args if name == "st" else args[::-1]
        names = re.findall(r"\w+", vector) if vector.startswith("{") else [vector]
        at, is_shared = self._words(where), "shared" in parts
        assert (at[mask] % (4 * len(names)) == 0).all(), "not aligned"
        memory = self.smem if is_shared else self.memory
        assert ((at[mask] >= 0) & (at[mask] // 4 + len(names) <= len(memory))).all(), f"outside of memory: {args}"
        for i, register in enumerate(names):
            words = np.where(mask, at // 4 + i, 0)
            if is_shared:
                self._watch(words, mask, writes=name == "st", values=self._value(register, "b32") if name == "st" else None)
            if name == "ld":
                self._set(register, memory[words], mask)
            else:
                memory[words[mask]] = self._value(register, "b32")[mask]

    def _watch(self, words, mask, *, writes, values=None):
        who = np.flatnonzero(mask)
        words = words[mask]
        others = (self.written_by[words] != -1) & (self.written_by[words] != who)
        if writes:
            others |= (self.read_by[words] != -1) & (self.read_by[words] != who)
            order = np.argsort(words, kind="stable")
            same = words[order][1:] == words[order][:-1]
            # The same value from several threads is no race.
            if (same & (values[mask][order][1:] != values[mask][order][:-1])).any():
                raise Race(f"several threads write words {words[order][1:][same][:4]}")
            self.written_by[words] = who
        else:
            # Several readers: of them any stands for all, who are not the writer to come.
            seen = self.read_by[words]
            self.read_by[words] = np.where((seen != -1) & (seen != who), self.n, who)
        if others.any():
            raise Race(f"word {words[others][0]}: thread {who[others][0]} and {self.written_by[words[others][0]]}")

    def _add(self, args, mask, *, returns):
        where, amount = args[-2:]
        words = np.where(mask, self._words(where) // 4, 0)
        for writer in (self.written_by, self.read_by):
            seen = writer[words[mask]]
            if ((seen != -1) & (seen != _ATOMIC)).any():
                raise Race(f"atomics and others at words {words[mask][:4]}")
        self.written_by[words[mask]] = _ATOMIC
        # In any order.
        order = self.rng.permutation(np.flatnonzero(mask))
        before = np.zeros(self.n, np.uint32)
        amounts = self._value(amount, "u32")
        for thread in order:
            before[thread] = self.smem[words[thread]]
            self.smem[words[thread]] += amounts[thread]
        if returns:
            self._set(args[0], before, mask)
