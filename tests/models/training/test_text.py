"""Promises of the text to train on: what is read, what is left out, how it is split."""

import base64
import dataclasses
import gzip
import json
import shutil

import numpy as np
import pytest

from hisa_jax.__main__ import main
from hisa_jax.models.training import text
from hisa_jax.models.training.text import load_corpus, read_corpus, save_corpus, why_not
from tests.models.training.folders import many_files, prose, write_files


def documents(split: np.ndarray) -> list[bytes]:
    before, *rest = split.tobytes().split(b"\0")
    assert before == b""
    return rest


def names(corpus):
    return {*corpus.train_names, *corpus.held_out_names}


def test_every_file_is_once_in_one_split_in_the_order_of_the_paths(tmp_path):
    files = many_files()
    corpus = read_corpus([write_files(tmp_path / "root", files)])
    assert sorted(corpus.train_names + corpus.held_out_names) == sorted(f"root/{path}" for path in files)
    for split, split_names in ((corpus.train, corpus.train_names), (corpus.held_out, corpus.held_out_names)):
        assert split.dtype == np.uint8
        assert list(split_names) == sorted(split_names)
        assert documents(split) == [files[name.removeprefix("root/")].encode() for name in split_names]
    assert 3 <= len(corpus.held_out_names) <= 15


def test_the_split_hangs_on_the_path_from_the_root_alone(tmp_path):
    files = many_files()
    first = read_corpus([write_files(tmp_path / "here" / "root", files)])
    # Elsewhere, written in another order, with more beside it.
    other = write_files(tmp_path / "there" / "root", dict(reversed(files.items())))
    again = read_corpus([other])
    assert first.sha256 == again.sha256
    assert (first.train_names, first.held_out_names) == (again.train_names, again.held_out_names)
    more = read_corpus([write_files(other, {f"more/file{at}.txt": prose(1000 + at) for at in range(30)})])
    assert set(first.held_out_names) <= set(more.held_out_names)
    assert set(first.train_names) <= set(more.train_names)


def test_about_four_files_in_a_hundred_are_held_out():
    paths = {f"folder/module_{at}.py" for at in range(20_000)}
    assert len(text._held_out(paths)) / len(paths) == pytest.approx(0.04, abs=0.005)


def test_of_two_files_one_is_held_out(tmp_path):
    corpus = read_corpus([write_files(tmp_path, {"a.txt": prose(0), "b.txt": prose(1)})])
    assert len(corpus.train_names) == len(corpus.held_out_names) == 1


def test_the_same_content_is_read_once(tmp_path):
    corpus = read_corpus([write_files(tmp_path / "root", {"a.txt": prose(0), "b.txt": prose(0), "c.txt": prose(1)})])
    assert names(corpus) == {"root/a.txt", "root/c.txt"}
    assert corpus.sources[0].dropped == {"same content": 1}


@pytest.mark.parametrize(("n_new", "is_kept"), [(4, False), (36, True)])
def test_a_file_that_mostly_repeats_another_is_dropped(tmp_path, n_new, is_kept):
    # Both are read to train on: their hashes are not the lowest, "low"'s is.
    files = {"first.txt": prose(0), "second.txt": prose(0, 40 - n_new) + prose(1, n_new), "third.txt": prose(2)}
    held_out = text._held_out(set(files))
    first, second = sorted(set(files) - held_out)[:2]
    contents = list(files.values())
    files = {first: contents[0], second: contents[1], **dict.fromkeys(held_out, contents[2])}
    corpus = read_corpus([write_files(tmp_path / "root", files)])
    assert (f"root/{second}" in names(corpus)) == is_kept
    assert corpus.sources[0].dropped == ({} if is_kept else {"near duplicate": 1})


def test_what_is_held_out_has_little_in_common_with_what_is_trained_on(tmp_path):
    files = many_files()
    held_out = sorted(text._held_out(set(files)))
    trained = sorted(set(files) - set(held_out))
    assert len(held_out) > 2
    # A fifth of it stands in a file to train on, indented: enough to leave it out.
    files[trained[0]] += "".join(f"    {line}\n" for line in files[held_out[0]].splitlines()[:8])
    corpus = read_corpus([write_files(tmp_path / "root", files)])
    assert f"root/{held_out[0]}" not in names(corpus)
    assert f"root/{trained[0]}" in corpus.train_names
    trained_lines = {line.strip() for line in corpus.train.tobytes().splitlines()}
    assert not {line.strip() for line in corpus.held_out.tobytes().splitlines() if b" " in line} & trained_lines


_NOT_TEXT = np.random.default_rng(0).integers(256, size=4000, dtype=np.uint8).tobytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (prose(0), None),
        ("Grüße aus der Küche, où l'été s'achève: 夏が終わる。\n" + prose(0), None),
        (prose(0)[:199], "not 200 to 1000000 bytes"),
        (prose(0, 30_000)[:1_000_001], "not 200 to 1000000 bytes"),
        (prose(0) + "\0", "not text"),
        (prose(0).encode() + b"\xff", "not text"),
        (_NOT_TEXT, "not text"),
        ("".join(f"    0x{at:04x}: 0x{at * 7:04x},\n" for at in range(300)), "digits"),
        (prose(0).replace("\n", " ") * 3, "long lines"),
        ("the same line over and over\n" * 100, "compresses unlike text"),
        (base64.encodebytes(_NOT_TEXT.translate(bytes(range(128)) * 2)), "compresses unlike text"),
    ],
)
def test_only_text_is_read(content, reason):
    assert why_not(content.encode() if isinstance(content, str) else content) == reason


def test_packed_files_are_unpacked_and_links_and_packages_left_alone(tmp_path):
    root = write_files(
        tmp_path / "root",
        {
            "a.txt": prose(0), "b.txt.gz": gzip.compress(prose(1).encode()), "broken.gz": prose(2),
            "site-packages/c.txt": prose(3), "deep/__pycache__/d.txt": prose(4),
        },
    )  # fmt: skip
    elsewhere = write_files(tmp_path / "elsewhere", {"e.txt": prose(5)})
    (root / "link.txt").symlink_to(elsewhere / "e.txt")
    (root / "folder").symlink_to(elsewhere)
    corpus = read_corpus([root])
    assert names(corpus) == {"root/a.txt", "root/b.txt.gz"}
    assert sorted(documents(corpus.train) + documents(corpus.held_out)) == sorted(
        prose(seed).encode() for seed in (0, 1)
    )


def test_a_manual_page_starts_at_its_title(tmp_path):
    macros = '.\\" Made by a program\n' + ".de Sp\n.if t .sp .5v\n..\n" * 20
    page = '.TH LS 1 "today"\n.SH NAME\n' + prose(0)
    code = "text\n.TH is a macro, and this no manual page\n" + prose(1)
    corpus = read_corpus([write_files(tmp_path, {"ls.1": macros + page, "code.py": code})])
    assert sorted(documents(corpus.train) + documents(corpus.held_out)) == sorted([page.encode(), code.encode()])


def test_without_folders_it_reads_what_the_machine_has(tmp_path, monkeypatch):
    library = write_files(tmp_path / "lib", {"a.py": prose(0), "test/test_a.py": prose(1), "b.py": prose(2)})
    manual = write_files(
        tmp_path / "man",
        {"man1/ls.1.gz": gzip.compress(prose(3).encode()), "de/man1/ls.1.gz": gzip.compress(prose(4).encode())},
    )
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: {"stdlib": str(library)}[name])
    monkeypatch.setattr(text, "_MANUAL", manual)
    monkeypatch.setattr(text, "_LICENSES", tmp_path / "not there")
    monkeypatch.setattr(text.sys, "base_prefix", str(write_files(tmp_path / "prefix", {"share/doc/c.txt": prose(5)})))
    corpus = read_corpus()
    assert names(corpus) == {"python/a.py", "python/test/test_a.py", "python/b.py", "man1/ls.1.gz", "doc/c.txt"}
    assert [source.name for source in corpus.sources] == ["python", "man1", "doc"]


def test_the_card_counts_what_is_there(tmp_path):
    roots = [
        write_files(tmp_path / "one", {**many_files(), "short.txt": "short"}),
        write_files(tmp_path / "two", {"only.txt": prose(500)}),
    ]
    corpus = read_corpus(roots)
    card = json.loads(json.dumps(corpus.card()))
    assert [source["name"] for source in card["sources"]] == ["one", "two"]
    for split in ("train", "held_out"):
        assert card[f"{split}_bytes"] == getattr(corpus, split).size
        assert card[f"{split}_bytes"] == sum(source[f"{split}_bytes"] for source in card["sources"])
        assert card[f"{split}_files"] == sum(source[f"{split}_files"] for source in card["sources"])
    assert card["sources"][0]["dropped"] == {"not 200 to 1000000 bytes": 1}
    assert card["sha256"] == corpus.sha256


def test_the_hash_tells_apart_what_differs_in_either_split(tmp_path):
    corpus = read_corpus([write_files(tmp_path, many_files())])
    others = [dataclasses.replace(corpus, **{split: getattr(corpus, split)[1:]}) for split in ("train", "held_out")]
    assert len({other.sha256 for other in (corpus, *others)}) == 3


@pytest.mark.parametrize("name", ["corpus.npz", "corpus"])
def test_a_saved_corpus_is_loaded_as_it_was(tmp_path, name):
    corpus = read_corpus([write_files(tmp_path / "root", many_files())])
    save_corpus(corpus, tmp_path / name)
    loaded = load_corpus(tmp_path / name)
    np.testing.assert_array_equal(loaded.train, corpus.train)
    np.testing.assert_array_equal(loaded.held_out, corpus.held_out)
    assert loaded.card() == corpus.card()
    assert (loaded.train_names, loaded.held_out_names) == (corpus.train_names, corpus.held_out_names)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 nor this"])
def test_a_file_that_is_no_corpus_is_refused(tmp_path, content):
    (tmp_path / "corpus.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"load_corpus: .*corpus.npz is no corpus written by save_corpus"):
        load_corpus(tmp_path / "corpus.npz")


def test_an_archive_of_other_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", train=np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"other.npz is no corpus written by save_corpus: .*held_out"):
        load_corpus(tmp_path / "other.npz")


def test_folders_that_do_not_do_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="read_corpus: folders has .*missing, wanted a folder"):
        read_corpus([tmp_path / "missing"])
    for place in ("a", "b"):
        write_files(tmp_path / place / "same", {"file.txt": prose(0)})
    with pytest.raises(ValueError, match=r"folders has .*a/same and .*b/same, wanted folders of different names"):
        read_corpus([tmp_path / "a" / "same", tmp_path / "b" / "same"])
    with pytest.raises(ValueError, match=r"0 files to train on and 1 held out from .*same, wanted at least one"):
        read_corpus([tmp_path / "a" / "same"])


def test_the_command_writes_a_corpus_and_says_what_is_in_it(tmp_path, capsys):
    root = write_files(tmp_path / "root", many_files())
    shutil.copytree(root, tmp_path / "copy")
    out = tmp_path / "corpus.npz"
    assert main(["data", "--out", str(out), "--folder", str(root), "--folder", str(tmp_path / "copy")]) == 0
    corpus = load_corpus(out)
    printed = capsys.readouterr().out
    assert f"root: {corpus.train.size:,} bytes of {len(corpus.train_names)} files" in printed
    assert "copy: 0 bytes of 0 files, held out 0 of 0, left out 200" in printed
    assert corpus.sha256 in printed


def test_the_command_names_a_folder_that_is_none(tmp_path, capsys):
    assert main(["data", "--out", str(tmp_path / "corpus.npz"), "--folder", str(tmp_path / "missing")]) == 1
    assert "missing, wanted a folder" in capsys.readouterr().err
