"""Data: the one reader of text, for tuning, calibration, perplexities and comparisons alike.

reading.py     files and data sets, row by row, with the place of each
parsing.py     a row -> a document, a conversation, or a prompt and its completion
templates.py   a conversation -> text, by the tokenizer's chat template or a plain prompt; nothing is lost silently
encoding.py    each of them -> token ids and labels: what is learned of it
tokens.py      a text -> token ids
"""
