"""Answers: decoding, sampling, text as it comes."""
