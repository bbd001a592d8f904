"""What eval.py needs beside engine.py: the paper's baselines, statistics and tables, one episode live."""
