# host.sh: the first process of a host, in namespaces of its own. hosts.py sets the environment:
# NAME, ADDRESS, FOLDER (the host's disk), SHARED (what all hosts see), LAYERS (of
# /usr: Python, sshd and rsync, the system's), VISIBLE (paths below /root, /tmp or /run that the
# host must see).
set -eu
hostname "$NAME"
mount --make-rprivate /
# Seen by this host alone.
mount -t overlay overlay -o "lowerdir=$LAYERS" /usr
mount -t tmpfs -o size=1g tmpfs /dev/shm
# A shared file system, whose mount point is not made on the real disk.
mount -t tmpfs tmpfs /mnt
mkdir /mnt/brstnet
mount --rbind "$SHARED" /mnt/brstnet
for file in hosts resolv.conf passwd group; do mount --bind "$FOLDER/etc/$file" "/etc/$file"; done
for path in $VISIBLE; do
    mkdir -p "$FOLDER$path"
    mount --rbind "$path" "$FOLDER$path"
done
mount --rbind "$FOLDER/run" /run
mount --rbind "$FOLDER/root" /root
cd /
mkdir -p /run/sshd
cp "$FOLDER/etc/sshd_config" "$FOLDER/etc/host_key" /run/sshd/
mount --rbind "$FOLDER/tmp" /tmp
until ip -4 -o address | grep -q " $ADDRESS/"; do sleep 0.05; done
exec /usr/sbin/sshd -D -e -f /run/sshd/sshd_config
