#!/bin/sh
# Prints the Secrets that the manifests name, with new random passwords. They are in no file of this repository:
#   k8s/secrets.sh | kubectl apply --namespace folkmoot -f -
# or only some: k8s/secrets.sh tls. Once: with new passwords everything that connects must be started again. Certificates
# are read again, and last a year.
set -eu
random() { openssl rand -hex 32; }
secret() { # NAME, then lines "key: value"
  printf -- '---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\ntype: %s\nstringData:\n' "$1" "$2"
  shift 2
  printf '  %s\n' "$@"
}
block() { # KEY FILE
  printf '%s: |\n' "$1"
  sed 's/^/    /' "$2"
}
store() {
  password=$(random)
  secret folkmoot-store Opaque "password: \"$password\"" "url: \"redis://:$password@folkmoot-store:6379\"" \
    "valkey.conf: \"requirepass $password\""
}
ray_store() {
  password=$(random)
  secret folkmoot-ray-store Opaque "password: \"$password\"" "valkey.conf: \"requirepass $password\""
}
ray_token() { secret folkmoot-ray-token Opaque "auth_token: \"$(random)\""; }
tls() { # a certificate for the gateways, of a CA whose key is thrown away
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  new="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
  names=DNS:localhost,IP:127.0.0.1
  for name in folkmoot-gateway folkmoot-gateways; do
    names=$names,DNS:$name,DNS:$name.folkmoot,DNS:$name.folkmoot.svc,DNS:$name.folkmoot.svc.cluster.local
  done
  echo "subjectAltName=$names" >"$folder/names"
  {
    openssl req -x509 $new -days 365 -subj /CN=folkmoot-ca -keyout "$folder/ca.key" -out "$folder/ca.crt"
    openssl req $new -subj /CN=folkmoot-gateway -keyout "$folder/tls.key" -out "$folder/tls.csr"
    openssl x509 -req -in "$folder/tls.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -CAcreateserial -days 365 \
      -extfile "$folder/names" -out "$folder/tls.crt"
  } 2>/dev/null
  secret folkmoot-gateway-tls kubernetes.io/tls "$(block tls.crt "$folder/tls.crt")" \
    "$(block tls.key "$folder/tls.key")" "$(block ca.crt "$folder/ca.crt")"
}
for part in ${*:-store ray_store ray_token tls}; do
  case $part in
    store | ray_store | ray_token | tls) $part ;;
    *) echo "no secret $part: store, ray_store, ray_token or tls" >&2 && exit 2 ;;
  esac
done
