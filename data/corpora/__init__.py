"""Corpora as they are downloaded, one small table of facts each, and the field's lists; `affekt import` reads them."""
