# What the guest image promises, checked inside it (bash, as root):
#   node scripts/guest/qemu.mjs --script scripts/guest/check.sh
failed=0
as_user() { setpriv --reuid 1000 --regid 1000 --init-groups env -i HOME=/home/user USER=user TERM=xterm LANG=C.UTF-8 bash -l -c "$1"; }
# check NAME EXPECTED COMMAND: the output of the command as user is as expected
check() {
  local got
  got=$(cd /home/user && as_user "$3" 2>&1)
  if [[ $got == $2 ]]; then echo "ok   $1"; else echo "FAIL $1: $(tail -n 5 <<< "$got")"; failed=1; fi
}
check 'the user'               'user 1000 1000 /home/user /bin/bash' 'echo $(id -un) $(id -u) $(id -g) ~ $(getent passwd user | cut -d: -f7)'
check 'sudo without password'  'root'            'sudo -n whoami'
check 'path'                   '/usr/local/bin:*' 'echo $PATH'
check 'path with private bins' '/home/user/.local/bin:/home/user/bin:*' 'mkdir -p ~/.local/bin ~/bin; bash -l -c "echo \$PATH"; rmdir ~/.local/bin ~/.local ~/bin'
check 'locale'                 'C.UTF-8 é'       'echo $LANG $(printf "\xc3\xa9")'
check 'host name'              'amberbox localhost' 'echo $(hostname 2>/dev/null || cat /proc/sys/kernel/hostname) $(getent hosts 127.0.0.1 | tr -s " " | cut -d" " -f2)'
check 'user xattrs'            'hello'           'touch x; setfattr -n user.test -v hello x; getfattr --only-values -n user.test x; rm x'
check 'tput'                   '80 256'          'echo $(tput cols) $(TERM=xterm-256color tput colors)'
check 'bash, coreutils'        '6 3'             'a=(1 2 3); echo $((a[0]+a[1]+a[2])) $(seq 3 | wc -l)'
check 'python'                 '3.11.* True'     'python3 -c "import ssl, sqlite3, ctypes, json, sys, zoneinfo; print(sys.version.split()[0], zoneinfo.ZoneInfo(\"Europe/Berlin\") is not None)"'
check 'byte code is used'      '0'               'python3 -v -c "import json, asyncio, http.server, email, sqlite3" 2>&1 | grep "code object from" | grep -vc "\.pyc"'
check 'venv'                   'ok'              'python3 -m venv /tmp/v && echo ok'
check 'pip of the venv'        'pip 23.* from /tmp/v/*' '/tmp/v/bin/pip --version'
check 'venv byte code is used' '0'               '/tmp/v/bin/python -v -c "import pip._internal.cli.main, setuptools" 2>&1 | grep "code object from" | grep -vc "\.pyc"'
check 'pip lists'              'pip setuptools'  'echo $(/tmp/v/bin/pip list --format freeze | cut -d= -f1)'
check 'venv without the seed'  'ok*pip*'         'python3 -m venv --without-pip /tmp/w && echo ok && /tmp/w/bin/python -m ensurepip | grep -q Success && /tmp/w/bin/pip3 --version'
check 'git'                    '1 file changed*' 'git init -q /tmp/g && cd /tmp/g && git config user.email a@b && git config user.name n && echo 1 > f && git add f && git commit -q -m m && git show --stat --format= | tail -1 | sed "s/^ //"'
check 'curl'                   'curl 7*https*'   'echo $(curl --version | tr "\n" " ")'
check 'ca certificates'        'yes'             'test $(grep -c BEGIN /etc/ssl/certs/ca-certificates.crt) -gt 100 && echo yes'
check 'apt can work'           '*python3*'       'apt-cache show python3 2>&1; dpkg -l python3 | tail -1'
check 'procps, iproute2'       '*UNKNOWN*bash*'  'ip -br link show lo; ps -ef | grep -m1 bash'
check 'pseudo-terminals'       '*/dev/pts/*'     'script -qc tty /dev/null'
check 'io_uring, memfd, fifo'  'ok'              'mkfifo /tmp/p; (echo ok > /tmp/p &); cat /tmp/p'
check 'file system'            '/dev/root ext4*noatime*' 'grep " / " /proc/mounts | cut -d" " -f1,3,4'
dmesg -l err,warn 2>/dev/null | tail -5
exit $failed
