"""A trained run in forms that other systems serve. Each starts from the folder that `coe-dist export weights` writes.

mlflow_model.py   an MLflow model, saved in a folder, logged in the run's own MLflow run, registered
mlflow_script.py  the one file that MLflow loads such a model from
packaged_code.py  the part of this package that answering needs, to travel with the model
onnx_graphs.py    one ONNX file for the delegator and one for each expert, and a manifest
onnx_runner.py    answers from those files with numpy and onnxruntime alone
"""
