"""Stores of any kind that fsspec knows (s3://, gs://, ...): data sets read from one, run folders mirrored to one.

    remote.py    a folder of a store: list, read, write, remove; every failure is one StoreError of one line
    download.py  a file from a store onto this machine's disk, in parallel parts, hashed on the way
    staging.py   this machine's copies of .beton files: one for all its processes, verified, removed when unused
    datasets.py  data.folder, be it a path or a URL: what is known of a split, and its file on this machine
    mirror.py    the thread that keeps a run folder's copy in a store up to date
    pulling.py   a run folder from its copy in a store

What comes from a store is not trusted: names stay within their folder, content is compared with its sha256.
"""
