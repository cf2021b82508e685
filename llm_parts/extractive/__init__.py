"""Answers without a language model: every schema is answered from the texts in the prompt, by keywords and embeddings.

It makes a first run possible with nothing installed and nothing spent, and is what an LLM has to beat.
"""
