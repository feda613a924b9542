#!/usr/bin/env bash
# Makes a machine a node: `bash ~/brstnet/clusters/setup.sh head`, or `... worker`.
#
# Ray runs it (head_setup_commands, worker_setup_commands) on each new node and again when a mounted
# file has changed, so each step is quick if its work is done. The environment is installed from the
# network once: the first node leaves a tarball of it on the shared file system, the others unpack that.
#
# Set before it, where a cluster differs:
#   BRSTNET_SHARED   the shared file system (/mnt/brstnet)
#   BRSTNET_CACHE    local copies of stores (~/.cache/brstnet)
#   BRSTNET_EXTRAS   of pyproject.toml, for what a provider needs (cluster)
#   PYTHON           the same version on all nodes (python3)
set -euo pipefail

role=${1:-}
shared=${BRSTNET_SHARED:-/mnt/brstnet}
cache=${BRSTNET_CACHE:-$HOME/.cache/brstnet}
extras=${BRSTNET_EXTRAS:-cluster}
python=${PYTHON:-python3}
project=$HOME/brstnet
venv=$project/.venv

die() {
    printf 'setup.sh: %s\n' "$*" >&2
    exit 1
}

# rsync keeps the mode that the files have at home, and a token that others can read is no secret.
# The tracking server's password is for the head alone, but Ray mounts files on all nodes.
close_secrets() {
    local file
    if [ "$role" = worker ]; then rm -f ~/.brstnet/tracking.env; fi
    for file in ~/.ray/auth_token ~/.brstnet/*.env; do
        if [ -e "$file" ]; then chmod 600 "$file"; fi
    done
}

# The first and the last line of ~/.bashrc and of the login shell's profile source this file, which is
# written anew each time. The first, since Debian's ~/.bashrc returns early where nobody types; the
# last, since pyenv or conda may put their Python before ours in between; and both files, since
# `bash --login`, which Ray calls, reads the profile and a profile need not read ~/.bashrc.
write_shell() {
    local file line='if [ -r ~/.brstnet/shell.sh ]; then . ~/.brstnet/shell.sh; fi'
    local profile=$HOME/.profile
    for file in ~/.bash_login ~/.bash_profile; do
        if [ -e "$file" ]; then profile=$file; fi
    done
    mkdir -p ~/.brstnet
    chmod 700 ~/.brstnet
    {
        echo '# Written by clusters/setup.sh; secrets stay in the *.env files beside it.'
        # shellcheck disable=SC2016 # for the shell that will read it
        printf '%s\n' \
            'for brstnet_env in ~/.brstnet/*.env; do' \
            '    if [ -r "$brstnet_env" ]; then set -a; . "$brstnet_env"; set +a; fi' \
            'done' \
            'unset brstnet_env' \
            'case "$PATH" in' \
            '    "$HOME/brstnet/.venv/bin:"*) ;;' \
            '    *) PATH="$HOME/brstnet/.venv/bin:$PATH" ;;' \
            'esac' \
            'export PATH RAY_AUTH_MODE=token'
        printf 'export BRSTNET_RUNS=%q BRSTNET_CACHE=%q\n' "$shared/runs" "$cache"
        if [ "$role" = head ]; then
            # shellcheck disable=SC2016 # only where tracking.env asks for a server
            printf '%s\n' \
                'if [ -n "${MLFLOW_BACKEND_STORE_URI:-}" ]; then' \
                '    case "${MLFLOW_HOST:-0.0.0.0}" in' \
                '        0.0.0.0) MLFLOW_TRACKING_URI="http://127.0.0.1:${MLFLOW_PORT:-5000}" ;;' \
                '        *) MLFLOW_TRACKING_URI="http://$MLFLOW_HOST:${MLFLOW_PORT:-5000}" ;;' \
                '    esac' \
                '    export MLFLOW_TRACKING_URI' \
                'fi'
        fi
    } > ~/.brstnet/shell.sh.new
    mv ~/.brstnet/shell.sh.new ~/.brstnet/shell.sh
    for file in ~/.bashrc "$profile"; do
        if ! grep -qsxF "$line" "$file"; then
            { echo "$line"; cat "$file" 2> /dev/null || true; echo; echo "$line"; } > "$file.brstnet"
            mv "$file.brstnet" "$(readlink -f "$file")"
        fi
    done
}

# Debian's and Ubuntu's Python makes no environments without a package of its own; a new machine's
# own updates may still hold apt's lock.
need_venv() {
    if ! "$python" -c 'import ensurepip' 2> /dev/null; then
        sudo apt-get -o DPkg::Lock::Timeout=300 update -q
        sudo apt-get -o DPkg::Lock::Timeout=300 install -yq python3-venv
    fi
}

# What the environment follows from, the path included: its scripts name it.
environment_key() {
    {
        cat pyproject.toml constraints.txt
        "$python" -c 'import platform, sys; print(sys.version, platform.machine())'
        echo "$venv" "$extras"
    } | sha256sum | cut -d ' ' -f 1
}

up_to_date() { [ "$(cat "$venv/installed" 2> /dev/null)" = "$key" ]; }

# A tarball has this name only when it is whole. A broken one fails here and is then made again.
unpack() {
    [ -e "$tarball" ] || return 1
    echo "unpacking $tarball"
    rm -rf "$venv.new"
    mkdir "$venv.new"
    tar -xf "$tarball" -C "$venv.new" || return 1
    rm -rf "$venv"
    mv "$venv.new" "$venv"
    up_to_date
}

# Editable: new code needs no install. The key goes in last, so what was cut short is done again.
install() {
    need_venv
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install -q -c constraints.txt -e ".[$extras]"
    echo "$key" > "$venv/installed"
}

# Not compressed: network file systems are faster than gzip. Under the lock, where any other
# temporary file was left by a node that died; a month is longer than any sweep.
pack() {
    rm -f "$folder"/*.part
    if tar -cf "$tarball.part" -C "$venv" . && mv "$tarball.part" "$tarball"; then
        find "$folder" -name '*.tar' -mtime +30 -delete
    else
        rm -f "$tarball.part"
        echo "setup.sh: $tarball was not written (disk full?): the next node installs too" >&2
    fi
}

environment() {
    cd "$project"
    local key folder=$shared/environments
    key=$(environment_key)
    local tarball=$folder/$key.tar
    if up_to_date; then return; fi
    if ! [ -w "$shared" ]; then
        install
        return
    fi
    mkdir -p "$folder"
    if unpack; then return; fi
    exec 9> "$folder/lock"
    flock -w 1800 9 || die "$folder/lock: another node has held it for half an hour; is one hung?"
    if ! unpack; then
        install
        pack
    fi
    exec 9>&-
}

case $role in
head | worker) ;;
*) die "say 'head' or 'worker', not '$role'" ;;
esac
close_secrets
write_shell
environment
