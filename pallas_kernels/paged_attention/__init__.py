"""Attention of tiles of queries to the K/V rows in their pages: decode rows, prompt chunks, finetuning windows."""
