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
# The model selects 256 of 1,870 tokens. `hisa` and `scan` choose them among 1024. `block-sparse` takes the best blocks
# whole.

# %%
command = ["evaluate", "--checkpoint", "bytes", "--tasks", "lamps", "--include", str(folder)]
command += ["--indexers", "flat,hisa,scan,block-sparse", "--limit", "0", "--dtype", "float32", "--batch", "2"]
command += ["--json", str(folder / "found.json")]
with contextlib.redirect_stderr(io.StringIO()):  # progress
    status = main(command)
assert status == 0

# %% [markdown]
# After each value comes its 95 % interval, then the mean difference to the first indexer on the same questions with its
# own. Eight questions leave wide intervals: where they overlap nothing is shown. Ask a hundred.
#
# ## A picture

# %%
found = json.loads((folder / "found.json").read_text())
print(json.dumps(found["rows"], indent=1)[:600])
