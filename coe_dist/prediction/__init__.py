"""Answers for a user's own image files.

files.py   names, folders and patterns -> every file once, in a stable order
decode.py  a file -> the pixels that evaluation would give the networks, or the reason why not
model.py   a run or an exported folder -> the model and how its images are prepared
answers.py chunks of files -> one row a file, decoding in parallel with the model
table.py   rows -> a CSV file, JSON or a table
"""
