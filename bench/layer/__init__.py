"""`python -m bench layer`: one attention layer of a published model, part by part."""
