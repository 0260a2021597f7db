#!/bin/sh
# One node of an elastic job on hosts without a cluster manager: run the same script on every node.
# train.service starts it; without systemd a loop does:
#
#     until ./train.sh; do sleep 30; done
#
# The folder is shared by all nodes and has ./mnist and data/mnist. The secret is made once:
#
#     openssl rand -hex 32 >/etc/ice-launch/token        # on every node the same, mode 0400
cd "$(dirname "$0")" || exit

# systemd hands the secret over in a folder of its own, which this user alone can read.
token=${CREDENTIALS_DIRECTORY:-/etc/ice-launch}/token

# The host `node0` hosts the endpoint. SIGTERM (`systemctl stop`, a shutdown) is the notice: the
# node leaves after a checkpoint, and the others continue if 2 are left.
exec ice-launch --devices 'cuda:*' --nnodes 2:8 \
    --rdzv-backend c10d --rdzv-endpoint node0:29500 --run-id job7 \
    --rdzv-token-file "$token" --rdzv-tls --max-restarts 4 --restart-window 3600 \
    --preempt-notice TERM --shutdown-timeout 240 --log-dir logs --tee 3 -- \
    ./mnist --data data/mnist --epochs 50 --out-dir out \
    --save-every-steps 500 --keep-checkpoints 3 --resume-from auto
