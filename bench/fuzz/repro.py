"""A wrong row as a Python program of its own: the calls that the judge made, their arrays, what it found."""

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.fuzz import forms
from bench.fuzz import scene as fuzz_scene
from bench.fuzz.judges import Judge, Verdict
from bench.fuzz.scene import Array, Call, Scene

_LITERAL = 400  # numbers of an array that is written out; larger ones are in the .npz beside the program
_PARTS = {
    "select": ("over", "keys_of", "select"),
    "select_limited": ("keys_of", "select_limited"),
    "select_limited_packed": ("keys_of", "select_limited_packed"),
    "select_limited_paged": ("keys_of", "select_limited_paged"),
    "select_packed": ("keys_of", "select_packed"),
    "select_paged": ("over", "keys_of", "written", "select_from", "select_paged"),
    "sparse_mla": ("sparse_mla",),
    "sparse_mla_paged": ("sparse_mla_paged",),
}
_HEAD = """\
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import hisa_jax as hj
from hisa_jax import BlockSparse, Dsa, Hisa, Scan

inf, nan = np.inf, np.nan
"""


def write(scene: Any, form: str, name: str, judge: Judge, title: str, folder: Path) -> str:
    """Writes NAME.py, and NAME.npz if it has large arrays; returns the program."""
    calls, verdict = _calls(scene, form, judge)
    arrays: dict[str, Array] = {}
    lines = [f"# {title}", *_comment(scene, verdict)]
    lines += ["", _HEAD.rstrip()]
    if scene.setup.implementation != "xla":
        lines += [
            "",
            "from bench.fuzz import setups  # noqa: E402",
            "",
            f"setups.interpret({scene.setup.implementation!r})",
        ]
    if scene.setup.__dict__.get("devices", 1) > 1:
        lines += ["", f'jax.config.update("jax_num_cpu_devices", {scene.setup.devices})']
    for part in dict.fromkeys(part for call in calls for part in _PARTS[call.form]):
        lines += ["", "", inspect.getsource(inspect.unwrap(getattr(forms, part))).rstrip()]
    body = []
    for i, call in enumerate(calls):
        names = _argument_names(call)
        body += [f"{name}{i} = {_literal(x, f'{name}{i}', arrays)}" for name, x in zip(names, call.args, strict=True)]
        given = ", ".join([*(f"{n}{i}" for n in names), *(f"{n}={v!r}" for n, v in call.options.items())])
        body += [f"got{i} = {call.form}({given})", f"print(got{i})"]
    lines += ["", ""]
    if arrays:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{name}.npz", **{key: x.view(_storable(x)) for key, x in arrays.items()})
        lines.append(f"arrays = np.load({str(folder / f'{name}.npz')!r})")
    program = "\n".join([*lines, *body]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(program)
    return program


def _calls(scene: Any, form: str, judge: Judge) -> tuple[list[Call], Verdict]:
    """What the judge calls, each once."""
    copy = type(scene)(**{name: getattr(scene, name) for name in scene.__dataclass_fields__})  # no run is remembered
    fuzz_scene.recorded = []
    try:
        verdict = judge.judge(copy, form)
        return fuzz_scene.recorded, verdict
    finally:
        fuzz_scene.recorded = None


def _comment(scene: Any, verdict: Verdict) -> list[str]:
    wrong = verdict.wrong[0]
    where = "no query's row" if wrong.r < 0 else f"request {wrong.r}, row {wrong.t}"
    if wrong.r >= 0 and isinstance(scene, Scene):
        where += f" at position {scene.query_positions[wrong.r, wrong.t]}, which sees {scene.visible[wrong.r, wrong.t]}"
    return [f"# {line}" for line in (f"Values: {scene.data}", f"Wrong: {where}:", *wrong.why.splitlines())]


def _argument_names(call: Call) -> list[str]:
    if call.form == "select_paged":
        life = list(inspect.signature(inspect.unwrap(forms.written)).parameters)[1 : 1 + len(call.args) - 5]
        return ["q", "w", "tables", "cu_seqlens_q", "lengths", *life]
    return list(inspect.signature(inspect.unwrap(forms.FORMS[call.form])).parameters)[: len(call.args)]


def _literal(x: Any, name: str, arrays: dict[str, Array]) -> str:
    if x is None:
        return "None"
    if isinstance(x, tuple):
        parts = (_literal(part, f"{name}_{i}", arrays) for i, part in enumerate(x))
        return f"({', '.join(parts)})"
    x = np.asarray(x)
    dtype = x.dtype.name if x.dtype.kind in "biuf" and x.dtype.name != "float8_e4m3fn" else f"ml_dtypes.{x.dtype.name}"
    if math.prod(x.shape) > _LITERAL:
        if np.unique(x.view(_storable(x))).size == 1:
            return f"np.full({x.shape}, {x.ravel()[:1].tolist()[0]!r}).astype({_quoted(dtype)})"
        arrays[name] = np.ascontiguousarray(x)
        return f"arrays[{name!r}].view({_quoted(dtype)})"
    values = x.astype(np.float64).tolist() if dtype.startswith("ml_dtypes") else x.tolist()
    return f"np.array({values!r}).astype({_quoted(dtype)}).reshape({x.shape})"


def _quoted(dtype: str) -> str:
    return dtype if dtype.startswith("ml_dtypes") else repr(dtype)


def _storable(x: Array) -> Any:
    """What a .npz can hold of a dtype that NumPy does not have."""
    return x.dtype if x.dtype.kind in "biuf" and x.dtype.name in np.sctypeDict else f"u{x.dtype.itemsize}"
