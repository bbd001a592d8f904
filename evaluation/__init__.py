"""What eval.py needs beside the engine: the paper's baselines, statistics and tables, one episode live."""
