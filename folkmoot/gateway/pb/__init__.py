"""Generated from `proto/folkmoot/v1` by `python -m folkmoot.gateway.generate`; never edited by hand."""
