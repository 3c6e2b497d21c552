"""One-line mistakes in the library, and for each the test that must fail of it: `make mutants` makes each and looks.

table.py       what a mistake is; the *.toml beside it list them
__main__.py    python -m tests.mutants: makes them in copies of the tree, one at a time
"""
