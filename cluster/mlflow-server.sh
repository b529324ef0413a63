#!/usr/bin/env bash
# MLflow's tracking server for several runs and machines: sqlite and artifacts in one folder, on 127.0.0.1.
#   cluster/mlflow-server.sh FOLDER [PORT]
# Artifacts go through the server, so that machines of a cluster need no access to FOLDER. MLflow asks for no password:
# leave the server on 127.0.0.1 and reach it through ssh, or put a proxy with TLS and a password before it.
# A host other than 127.0.0.1 is MLFLOW_HOST, for a private network; MLflow then answers only to the names in
# MLFLOW_ALLOWED_HOSTS (host:port, separated by commas).
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: cluster/mlflow-server.sh FOLDER [PORT]" >&2; exit 2; }
folder=$1 port=${2:-5000} host=${MLFLOW_HOST:-127.0.0.1}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
bin=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin
[ -x "$bin/mlflow" ] && export PATH=$bin:$PATH
case $host in
    127.*|localhost|::1) ;;
    *) echo "mlflow-server: $host can be reached by others, and MLflow asks nobody for a password" >&2 ;;
esac
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
# the address of the store in the environment, not on the command line: it may be a database with a password
export MLFLOW_BACKEND_STORE_URI=${MLFLOW_BACKEND_STORE_URI:-sqlite:///$folder/mlflow.db}
exec mlflow server --host "$host" --port "$port" --workers "${MLFLOW_WORKERS:-1}" \
    --serve-artifacts --artifacts-destination "file://$folder/mlartifacts"
