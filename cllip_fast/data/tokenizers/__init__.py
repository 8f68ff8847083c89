"""Kinds of tokenizers behind one interface; `cllip_fast.data.load_tokenizer` picks one by name or file."""
