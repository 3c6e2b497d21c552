# %% [markdown]
# # Indexers on your own questions
#
# Which indexer is good enough depends on your texts and your questions. So ask them. `hisa-jax evaluate` puts the same
# questions to a checkpoint by each indexer, and prints one table. This tutorial makes a task of its own questions. It
# needs `pip install 'hisa_jax[evaluate]' matplotlib` and a checkout, where the model is.

# %%
import contextlib
import io
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from hisa_jax.__main__ import main

# %% [markdown]
# ## Questions
#
# A question is a text, what is asked at its end, and the answer. Here the text is a part of the standard library, into
# which eight lines are put. The model of the repository has learnt to find such lines. For a model of yours take your
# documents, and sentences.

# %%
rng = np.random.default_rng(0)
source = Path(contextlib.__file__).read_text()
colours = ["amber", "cobalt", "coral", "copper", "emerald", "jade", "silver", "ruby"]
values = {f"{colour}-lamp-{i:02}": f"{rng.integers(10_000, 100_000)}" for i, colour in enumerate(colours)}
text = ""
for i, (key, value) in enumerate(values.items()):
    text += source[190 * i : 190 * (i + 1)] + f"\n<<key {key} = {value}>>\n"
questions = [{"question": f"{text}\n<<ask {key} = ", "answer": value} for key, value in values.items()]
print(len(questions), "questions about", len(text), "bytes; the last:", questions[-1]["question"][-28:])

# %% [markdown]
# ## A task
#
# A task of lm-eval is a YAML file beside its data: where the questions are, what of each is shown, and how an answer is
# judged. `exact_match` is 1 where the answer is right.

# %%
folder = Path(tempfile.mkdtemp())
(folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
(folder / "lamps.yaml").write_text(f"""
task: lamps
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [">>"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""")

# %% [markdown]
# ## Asking
#
# In a shell this is the command `hisa-jax evaluate` with the same words. The questions share their text, which is read
# once for each indexer. `--limit 0` asks all of them.
#
# The model selects 256 of the text's 1,800 tokens. `scan` chooses them among 1024. `block-sparse` takes the best blocks
# whole. `hisa` may be named, too.

# %%
command = ["evaluate", "--checkpoint", "bytes", "--tasks", "lamps", "--include", str(folder)]
command += ["--indexers", "flat,scan,block-sparse", "--limit", "0", "--dtype", "float32", "--batch", "1"]
command += ["--json", str(folder / "found.json")]
with contextlib.redirect_stderr(io.StringIO()):  # progress
    status = main(command)
assert status == 0

# %% [markdown]
# After each value comes its 95 % interval, then the mean difference to the first indexer on the same questions with its
# own. Eight questions leave wide intervals: where that of a difference holds 0, no difference is shown. Ask a hundred.
#
# ## A picture

# %%
rows = json.loads((folder / "found.json").read_text())["rows"]
names = [row["indexer"] for row in rows]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), width_ratios=(2, 3))
for i, row in enumerate(rows):
    left.plot([row["low"], row["high"]], [i, i], color="tab:blue", lw=2)
    left.plot(row["mean"], i, "o", color="tab:blue")
left.set(xlim=(0, 1.05), ylim=(len(rows) - 0.5, -0.5), title="right answers, 95 % intervals")
left.set_yticks(range(len(rows)), names)
right.imshow([row["values"] for row in rows], cmap="RdYlGn", vmin=-0.3, vmax=1.3, aspect="auto")
right.set_yticks(range(len(rows)), [])
right.set_xticks(range(len(values)), values, rotation=30, ha="right", fontsize=8)
right.set_title("question by question: green is right")
figure.tight_layout()
plt.show()
of = {row["indexer"]: row["mean"] for row in rows}
assert of["scan"] >= of["block-sparse"]

# %% [markdown]
# Needles in your own text need no file: `--tasks needles --text FOLDER --lengths 8192` hides them in what lies there.
# [Evaluation](../evaluate.md) has these, the tasks of lm-eval, and all options. Next: [training an indexer with
# replayed selections](replay.py).
