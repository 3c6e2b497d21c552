# %% [markdown]
# # From a checkpoint to a served answer
#
# A folder with `config.json` and safetensors becomes a server with OpenAI's interface. This tutorial looks into the
# folder, asks the model directly, serves it, asks it through the `openai` package, and looks at the tokens that its
# indexers read. It needs `pip install 'hisa_jax[serve]' openai matplotlib` and a checkout, where the checkpoint is.

# %%
import atexit
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import openai

from hisa_jax import models
from hisa_jax.models.locate import locate

# %% [markdown]
# ## The folder
#
# `bytes` is the name of the model that the repository ships. The path of a folder of yours goes in its place: the
# settings are DeepSeek-V3.2's or GLM-5's, and so are the tensors' names. Without a `tokenizer.json` tokens are bytes.

# %%
folder = locate("bytes")
for path in sorted(folder.glob("*.*")):
    print(f"{path.name:22}{path.stat().st_size / 1e6:8.2f} MB")
config = models.read_config(folder)
print(config.model_type, f"{config.num_hidden_layers} layers, up to {config.max_position_embeddings:,} tokens,")
print(f"each query reads {config.index_topk} that its layer's indexer of {config.index_n_heads} heads chooses")

# %% [markdown]
# ## A question
#
# The model was trained to find lines in a text. So we hide two in a Python source, and ask for one at the end. Asked
# directly it answers by its own flat indexer, and by HISA: the same weights with another indexer.

# %%
source = Path(json.decoder.__file__).read_text()
lines = source[:800], "\n<<key amber-finch-07 = 48392>>\n", source[800:1400], "\n<<key silver-lamp-21 = 90514>>\n"
prompt = "".join(lines) + source[1400:1600] + "\n<<ask amber-finch-07 = "
model = models.from_pretrained(folder)
sampling = models.Sampling(max_tokens=16, stop=(">>",))
print("flat:", models.generate(model, [prompt], sampling=sampling, chunk=256).texts)

# %% [markdown]
# ## A server
#
# From a shell this is `hisa-jax serve --checkpoint bytes --indexer hisa --block-size 32 --block-topk 32`. It loads,
# compiles, and says where it listens. Port 0 is any that is free.

# %%
command = [sys.executable, "-m", "hisa_jax", "serve", "--checkpoint", str(folder), "--port", "0", "--rows", "2"]
command += ["--max-length", "2048", "--indexer", "hisa", "--block-size", "32", "--block-topk", "32"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
atexit.register(server.kill)  # whatever goes wrong below
url = None
for line in server.stdout:
    print(line, end="")
    if found := re.match(r"serving \S+ on (http\S+)", line):
        url = found[1]
        break
assert url is not None

# %% [markdown]
# ## Asking
#
# Any client of OpenAI's interface will do. The key is not looked at unless the server was given one.

# %%
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
name = client.models.list().data[0].id
answer = client.completions.create(model=name, prompt=prompt, max_tokens=16, temperature=0, stop=[">>"])
print(repr(answer.choices[0].text), answer.choices[0].finish_reason, answer.usage)
assert answer.choices[0].text == "48392"

# %% [markdown]
# The same as a stream: each event brings what is new. The prompt's pages are still there from before, so it starts at
# once.

# %%
stream = client.completions.create(model=name, prompt=prompt, max_tokens=16, temperature=0, stop=[">>"], stream=True)
print([event.choices[0].text for event in stream])

# %% [markdown]
# ## What the indexers read
#
# `POST /look` says which tokens flat, HISA, the scan and block-sparse select for one query of a text. The page at the
# server's address shows the same. We look at the query that has to make the answer's first digit, in the layer whose
# flat indexer selects the largest share of the wanted line.


# %%
def look(layer):
    body = json.dumps({"text": prompt, "layer": layer, "topk": 64}).encode()
    request = urllib.request.Request(f"{url}/look", body, {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))


start = prompt.index("<<key amber")
needle = set(range(start, prompt.index("\n", start)))
looks = [look(layer) for layer in range(config.num_hidden_layers)]
share = [len(needle & set(seen["methods"][0]["positions"])) / len(needle) for seen in looks]
print("share of the line that flat selects, by layer:", [f"{x:.0%}" for x in share])
seen = looks[int(np.argmax(share))]
for method in seen["methods"]:
    print(f"{method['name']:14}recall {method['recall']:.2f}, attention kept {method['mass']:.2f}")

# %%
figure, axes = plt.subplots(len(seen["methods"]), 1, figsize=(9, 3.2), sharex=True)
for axis, method in zip(axes, seen["methods"], strict=True):
    axis.axvspan(min(needle), max(needle), color="tab:orange", alpha=0.5, lw=0)
    axis.vlines(method["positions"], 0, 1, lw=0.8)
    axis.set_ylabel(method["name"], rotation=0, ha="right", va="center")
    axis.set(yticks=[], xlim=(0, len(prompt)))
axes[-1].set_xlabel("position in the prompt; orange: the line that was asked for")
figure.suptitle(f"Layer {seen['layer']}: 64 tokens that the query before the answer reads")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Stopping
#
# A signal stops it: what runs is finished, and the last line says that every page is free again.

# %%
server.terminate()
print(server.stdout.read(), "exit status", server.wait())
assert server.returncode == 0

# %% [markdown]
# Everything that it takes and refuses: [a server](../server.md). Next: [other indexers on your own
# questions](own_questions.py).
