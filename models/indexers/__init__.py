"""The indexers of published models, a module each, on one contract: docs/indexers.md shows them.

table.py    what the models' indexers are made of: a row a model
pieces.py   norms, RoPE, and what makes one key of several tokens
module.py   the Flax module that a row and a checkpoint's tensors make
cache.py    keys in pages, and the rows that unfinished entries are made of
"""

from hisa_jax.checks import optional_packages

with optional_packages():
    from hisa_jax.models.indexers.cache import IndexerCache
    from hisa_jax.models.indexers.module import Indexed, Indexer, from_weights
    from hisa_jax.models.indexers.table import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "Indexed", "Indexer", "IndexerCache", "from_weights"]
