"""The page of `python -m engine.report`: what is gathered for it, and its template."""
