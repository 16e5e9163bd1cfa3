"""Labels as text: tokenizer, templates, names of classes."""
