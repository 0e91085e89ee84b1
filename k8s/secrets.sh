#!/bin/sh
# Prints the Secrets that the manifests name, with new random passwords. They are in no file of this repository:
#   k8s/secrets.sh | kubectl apply --namespace folkmoot -f -
# Once: applied again, everything that connects must be started again.
set -eu
random() { openssl rand -hex 32; }
secret() { # NAME, then lines "key: value"
  printf -- '---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\ntype: Opaque\nstringData:\n' "$1"
  shift
  printf '  %s\n' "$@"
}
store=$(random)
ray_store=$(random)
secret folkmoot-store "password: \"$store\"" "url: \"redis://:$store@folkmoot-store:6379\"" \
  "valkey.conf: \"requirepass $store\""
secret folkmoot-ray-store "password: \"$ray_store\"" "valkey.conf: \"requirepass $ray_store\""
secret folkmoot-ray-token "auth_token: \"$(random)\""
