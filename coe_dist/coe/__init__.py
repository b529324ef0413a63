"""The method, Collaboration of Experts (CoE): a light delegator gives a rough prediction of every image, which may
end its computation early, or selects ONE of several whole-network experts (Zhang, Chen and Zhong, arXiv 2107.03815).

Pure functions and nn.Modules: no process groups, no files, no logging, nothing of the rest of this project.
Docstrings say "the paper" only for what its abstract says; its equations were not available to us, and every formula
is our own rule.

Legend of the shape suffixes, used in the whole project:

    N  images of the global batch (rows in the order of the global batch)
    B  images of this rank's part of it
    S  of these B those that experts learn from: all, unless experts.share is below 1
    E  experts; an expert is named by its global id, 0 to E-1
    C  classes
    k  experts that see one training image: column 0 is the assigned expert
    images_NCHW: here C is colour channels; uint8, 0 to 255, normalised inside the networks

MACs are multiply-adds (what the paper and its literature call FLOPs) of one image.
"""
