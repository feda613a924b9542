"""One file per raw layout: each finds its sections and reads them."""
