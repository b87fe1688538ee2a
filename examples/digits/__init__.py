"""A small FLUX.1 pipeline that draws handwritten digits: its data, its words and its training."""
