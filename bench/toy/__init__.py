"""Small figures of what games, penalties and distances do, each with its rows: `python -m bench.toy`."""
