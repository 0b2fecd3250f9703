"""From files to batches: sources, formats, chat templates, loss masks, packing, the loader."""
