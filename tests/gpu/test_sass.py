"""What the assembler makes of the scoring loops, where `ptxas` and `nvdisasm` are at hand; neither needs a GPU."""

import re
import shutil
import subprocess

import pytest

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import gather_latents, gather_rows, listed_loop_text, sketch_loop_text
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_loop_text import OPERANDS, loop_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_shape import Shape
from hisa_jax.kernels_pallas.mosaic_gpu.sparse_mla_plan import KEY_DIM, LOAD_REGISTERS, PARTS, ROPE, VALUE_DIM

ADDRESSES = {"LIMITS", "O", "THRESHOLDS", "MASKS", "MAXIMA"}  # in device memory, of 64 bits
MOST_REGISTERS = 160  # a thread of three warp-groups that score

pytestmark = pytest.mark.skipif(
    not (shutil.which("ptxas") and shutil.which("nvdisasm")), reason="needs ptxas and nvdisasm on the path"
)


def shape(**fields):
    common = dict(H=64, row_bytes=128, n_parts=1, is_e4m3=True, ring=8, has_scale=True, out_columns=16384)
    return Shape(**{**common, "keep_first": 0, "keep_last": 0, "filters": False, **fields})


SHAPES = {
    "flat": shape(),
    "flat_filters": shape(filters=True),
    "flat_few": shape(maxima_of=8),
    "flat_32_heads": shape(filters=True, H=32, together=2),
    "scan_6_rows": shape(filters=True, rows=8, n_rows=6, n_linear=2, keep_first=1, keep_last=1),
    "scan_4_rows": shape(filters=True, rows=4, n_rows=4, n_linear=2, keep_first=1, keep_last=1),
    "scan_samples": shape(rows=8, n_rows=6, n_linear=2),
}


def entry(text, types, limits):
    """PTX as a kernel of its own, whose parameters are what it is given; `types`: their bits."""
    parameters = ", ".join(f".param .u{bits} p_{name}" for name, bits in types.items())
    loads = "\n".join(f".reg .b{bits} o_{name}; ld.param.u{bits} o_{name}, [p_{name}];" for name, bits in types.items())
    body = re.sub(r"\$([A-Z_]+)", r"o_\1", text)
    head = ".version 8.3\n.target sm_90a\n.address_size 64"
    return f"{head}\n.visible .entry loop({parameters}) {limits} {{\n{loads}\n{body}\nret;\n}}\n"


@pytest.fixture(params=SHAPES, scope="module")
def compiled(request, tmp_path_factory):
    """What ptxas says, and the instructions in order."""
    folder = tmp_path_factory.mktemp(request.param)
    types = {name: 64 if name in ADDRESSES else 32 for name in OPERANDS}
    return assembled(folder, entry(loop_ptx(SHAPES[request.param]), types, ".maxntid 384, 1, 1"))


def assembled(folder, text):
    """What ptxas says, and the instructions in order."""
    (folder / "loop.ptx").write_text(text)
    command = ["ptxas", "-arch=sm_90a", "-O3", "-v", "loop.ptx", "-o", "loop.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    command = ["nvdisasm", "-c", "loop.cubin"]
    listing = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return said, re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", listing, re.MULTILINE)


def test_sums_are_taken_while_a_product_is_in_flight(compiled):
    """Not after both: ptxas had moved the wait for the second product up to that for the first."""
    _, instructions = compiled
    waits = [i for i, x in enumerate(instructions) if x.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == 2, waits
    sums = [x for x in instructions[waits[0] : waits[1]] if x.split()[0] in ("FFMA", "FMUL")]
    assert len(sums) >= 20, f"{len(sums)} of the first half's sums are between the waits"


def test_products_are_not_serialized_and_registers_not_spilled(compiled):
    said, _ = compiled
    assert "serialize" not in said.lower(), said
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None and int(registers[1]) <= MOST_REGISTERS, said


def test_a_slot_is_handed_back_after_what_was_loaded_from_it_is_there(compiled):
    """An arrival is not ordered after loads: a load still on its way would read what the copy engine writes next."""
    _, instructions = compiled
    on_the_way: dict[str, str] = {}  # register -> the load that writes it
    n_arrivals = 0
    for x in instructions:
        opcode, _, rest = x.partition(" ")
        written, _, others = rest.partition(",")
        # A register that is read is there, and with it all that its load brings.
        read = set(re.findall(r"\bR\d+\b", rest if opcode.startswith(("ST", "SYNCS")) else others))
        ended = {load for register, load in on_the_way.items() if register in read}
        on_the_way = {register: load for register, load in on_the_way.items() if load not in ended}
        if opcode.startswith("LDS"):
            words = {"LDS.64": 2, "LDS.128": 4, "LDSM.16.M88.4": 4}.get(opcode, 1)
            on_the_way |= {f"R{int(written[1:]) + i}": x for i in range(words)}
        elif opcode.startswith("SYNCS.ARRIVE"):
            n_arrivals += 1
            assert not on_the_way, f"an arrival may pass {sorted(set(on_the_way.values()))}"
    assert n_arrivals == 2, n_arrivals


@pytest.mark.parametrize(("groups", "has_rope"), [((0, 2), False), ((1, 3), True)])
def test_the_loader_of_latents_in_8_bits_keeps_its_registers(tmp_path, groups, has_rope):
    types = {name: 64 if name in ("VALUES", "SCALES", "ROPE") else 32 for name in gather_latents.OPERANDS}
    text = gather_latents.latents_text(2 * KEY_DIM, VALUE_DIM // 128, groups, has_rope)
    said, instructions = assembled(tmp_path, entry(text, types, f".maxnreg {LOAD_REGISTERS}"))
    check_loader(said, instructions, most=700)  # two forms of the conversion: in a tile that runs one
    scales = next(i for i, x in enumerate(instructions) if x.startswith("LDG.E.CONSTANT"))
    assert scales < next(i for i, x in enumerate(instructions) if x.startswith("LDGDEPBAR"))


@pytest.mark.parametrize("columns", [*PARTS, (ROPE,)], ids=["first", "second", "rope"])
def test_the_loader_of_latents_keeps_its_registers(tmp_path, columns):
    types = {name: 64 if name == "SOURCE" else 32 for name in gather_rows.OPERANDS}
    text = gather_rows.rows_text(2 * KEY_DIM, tuple((first // 8, n // 8) for first, n in columns), 16, True)
    check_loader(*assembled(tmp_path, entry(text, types, f".maxnreg {LOAD_REGISTERS}")), most=150)


def check_loader(said, instructions, most):
    """A tile's code stays in the caches of instructions, and no copy is one that ptxas writes wrongly."""
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    assert len([x for x in instructions if x != "NOP"]) <= most, len(instructions)
    copies = [x for x in instructions if x.startswith("LDGSTS")]
    assert copies and not [x for x in copies if re.search(r"\[R\d+\+UR", x)], copies


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        (
            sketch_loop_text,
            sketch_loop_text.Shape(
                queries=1, rows=8, n=6, n_linear=2, page_size=64, n_pages=65536, table_size=65536, has_scale=True,
                out_columns=131072, sample_step=16,
            ),
            {"SMEM", "ROW", "START", "STEPS", "N_QUERIES"},
        ),
        (
            listed_loop_text,
            listed_loop_text.Shape(
                H=64, steps=16, page_size=64, n_pages=65536, table_size=65536, n_rows=1 << 22, capacity=12288,
                has_scale=True,
            ),
            {"SMEM", "ROW", "START", "STEPS"},
        ),
    ],
    ids=["sketches", "listed"],
)  # fmt: skip
def test_four_warp_groups_run_at_once_and_have_two_steps_on_their_way(tmp_path, text, shape, words):
    names = text.OPERANDS
    ptx = re.sub(r"\$(\d+)", lambda number: f"${names[int(number[1])]}", text.loop_ptx(shape))
    types = {name: 32 if name in words else 64 for name in names}
    said, instructions = assembled(tmp_path, entry(ptx, types, ".maxntid 128, 1, 1"))
    assert "serialize" not in said.lower() and "0 bytes spill stores, 0 bytes spill loads" in said, said
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None and int(registers[1]) <= 128, said
    # Of two steps before the loop, and of two in it.
    loads = sum(re.match(r"LDG\.[A-Z.]*128", x) is not None for x in instructions)
    assert loads >= 16, loads
