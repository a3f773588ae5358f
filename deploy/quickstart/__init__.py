"""The quickstart: real models and real data from the package index, optimized and served with one command."""
