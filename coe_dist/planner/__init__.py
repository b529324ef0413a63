"""Memory, bytes, time and cost of a run before it starts: arithmetic on counted networks and on rates.

1. `facts` counts a network without computing anything: MACs, parameters, saved activations, memory traffic.
2. `layout` says which rank holds how many images, pairs and experts, and how many bytes travel (exact, or exact means).
3. `devices` has tabulated rates of common devices; measured rates of a machine have the same form (`rates`).
4. `step` and `memory` put them together for the slowest and the fullest rank; `plan` adds hours, scaling and advice.

Nothing here imports torch.distributed or the training code; what it predicts is training/step.py.
"""
