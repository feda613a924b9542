#!/bin/sh
# debian.sh FOLDER: sshd and rsync for the hosts of tests/cluster, where the system has none.
# Debian's packages are downloaded and unpacked below FOLDER; nothing is installed. Whatever goes
# wrong is said in FOLDER/why, which the tests give as their reason to be skipped.
set -u
folder=$1
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -rf "$folder/why"

why() {
    echo "tests/cluster will be skipped: $1" | tee "$folder/why"
    exit 0
}

PATH=$PATH:/usr/sbin:/sbin
if command -v sshd > /dev/null && command -v rsync > /dev/null; then exit 0; fi
if test -x "$folder/usr/sbin/sshd" && test -x "$folder/usr/bin/rsync"; then exit 0; fi
command -v apt-get > /dev/null || why "no sshd or rsync here, and no apt-get to fetch them with"

# Lists and archives of our own: the system's stay as they are.
fetch="apt-get -qq -o Debug::NoLocking=1 -o APT::Sandbox::User=root"
fetch="$fetch -o Dir::State::lists=$folder/lists -o Dir::Cache=$folder/cache"
mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
$fetch update > "$folder/log" 2>&1 || why "no Debian package lists ($folder/log)"
# With what they need and the system has not: apt knows. Newer ones than the system's stay unpacked too.
$fetch install --yes --download-only --no-install-recommends openssh-server rsync \
    >> "$folder/log" 2>&1 || why "no Debian packages of sshd and rsync ($folder/log)"
for package in "$folder"/cache/archives/*.deb; do
    dpkg -x "$package" "$folder" || why "$package cannot be unpacked"
done
if test -d "$folder/lib" && ! test -L "$folder/lib"; then cp -a "$folder/lib/." "$folder/usr/lib/"; fi
rm -rf "$folder/cache" "$folder/lists"
