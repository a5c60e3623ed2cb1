"""Pieces of SMILES, proteins and nucleic acids (see NOTICE.md), and the Python code that folders with them carry."""
