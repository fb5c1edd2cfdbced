#!/bin/sh
# Turns a fresh Debian tree into the guest's: project files, the user, the venv
# seed, byte code, no caches. Run by mmdebstrap as a customize hook, outside of
# the chroot, with the tree as its argument. SOURCE_DATE_EPOCH is set.
set -eu
umask 022
root=$1
here=$(dirname "$0")
python=python3.11
stdlib=/usr/lib/$python

# mmdebstrap copies these two from the build host
rm -f "$root/etc/resolv.conf" "$root/etc/hostname"
# git keeps no owners and of the modes only the executable bit
tar --create --directory "$here/overlay" --owner=0 --group=0 --mode=u=rwX,go=rX . |
  tar --extract --directory "$root" --no-overwrite-dir --no-same-permissions --same-owner
chmod 440 "$root/etc/sudoers.d/user"
cat > "$root/etc/apt/sources.list" <<'S'
deb http://deb.debian.org/debian bookworm main
deb http://deb.debian.org/debian bookworm-updates main
deb http://deb.debian.org/debian-security bookworm-security main
S
rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap"
mv "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$root/etc/dpkg/dpkg.cfg.d/slim"
# PID 1 is the agent: packages must not try to start services
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"

# Debian asks for an apport hook at every python start; Debian has no apport.
: > "$root/etc/$python/sitecustomize.py"

chroot "$root" useradd --uid 1000 --user-group --create-home --shell /bin/bash --groups sudo user
cp "$root/etc/skel/.bashrc" "$root/root/.bashrc"
cp "$root/etc/skel/.profile" "$root/root/.profile"

# With the one locale in an archive, a program opens and maps one file at its start
# instead of twelve: 61 of the 155 system calls of `bash -c :`.
chroot "$root" localedef --add-to-archive /usr/lib/locale/C.utf8

# What `python3 -m venv` installs, made once by Debian's own ensurepip.
if [ -d "$root$stdlib/ensurepip" ]; then
  seed=/usr/lib/amberbox/venv-seed
  chroot "$root" python3 -m venv /venv
  mkdir -p "$root$seed/bin"
  mv "$root/venv/lib/$python/site-packages" "$root$seed/site-packages"
  for script in pip pip3 "pip${python#python}"; do
    # the first line names the interpreter: the copy writes its own
    sed 1d "$root/venv/bin/$script" > "$root$seed/bin/$script"
  done
  rm -rf "$root/venv"
  (cd "$root/usr/share/python-wheels" && LC_ALL=C ls) > "$root$seed/wheels"
  chroot "$root" dpkg-divert --quiet --local --rename --divert "$stdlib/ensurepip/_debian.py" --add "$stdlib/ensurepip/__init__.py"
  cp "$here/ensurepip.py" "$root$stdlib/ensurepip/__init__.py"
  chmod 644 "$root$stdlib/ensurepip/__init__.py"
fi

# No caches, logs, backups. (apt's own are cleared by mmdebstrap afterwards; it keeps
# its apt configuration in the tree's /tmp until then, which therefore must stay.)
rm -rf "$root"/var/cache/ldconfig/* "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old "$root"/root/.cache \
  "$root"/etc/passwd- "$root"/etc/group- "$root"/etc/shadow- "$root"/etc/gshadow- "$root"/etc/subuid- "$root"/etc/subgid-
find "$root/var/log" -type f -delete
: > "$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"

# Byte code names the modification time of its source, so sources get their final
# time first. SOURCE_DATE_EPOCH must be hidden from python: it would choose
# byte code that hashes its source at every import.
clamp() {
  find "$root" -xdev \( -path "$root/proc" -o -path "$root/sys" -o -path "$root/dev" \) -prune -o \
    -newermt "@$SOURCE_DATE_EPOCH" -exec touch --no-dereference --date "@$SOURCE_DATE_EPOCH" {} +
}
clamp
find "$root/usr/lib/python3" "$root$stdlib" "$root/usr/lib/amberbox" -type d -name __pycache__ -prune -exec rm -rf {} +
chroot "$root" env -u SOURCE_DATE_EPOCH python3 -m compileall -q -j 2 --invalidation-mode timestamp \
  -x '/lib2to3/tests/|/test/bad|badsyntax' /usr/lib/python3 "$stdlib" /usr/lib/amberbox
clamp
