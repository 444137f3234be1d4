#!/bin/sh
# /init of the test guests. What it does is asked on the kernel command line:
#   pv.run=shell|poweroff|reboot|halt|disktest|compare|bench   (default: shell)
#   pv.wait=sda,vda        wait up to ten seconds for these devices
#   pv.modules=ext4        load these groups of modules too
#   pv.disktest=sda,vda    pv.megabytes=4          disks to test (default: both, where present)
#   pv.compare=sda,vda     pv.megabytes=32 pv.operations=2000 pv.seed=1
#   libata.dma=0 …         parameters of modules, as for a built-in driver
echo '@@boot init'
export PATH=/bin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
read -r command_line </proc/cmdline

option() { # NAME DEFAULT
    value=$2
    for word in $command_line; do
        case $word in pv."$1"=*) value=${word#*=} ;; esac
    done
}

load() { # GROUP
    while read -r module; do
        parameters=
        for word in $command_line; do
            case $word in "$module".*=*) parameters="$parameters ${word#*.}" ;; esac
        done
        insmod "/lib/modules/$module.ko" $parameters || echo "paravane: $module did not load"
    done <"/lib/modules/$1.order"
}

each() { # COMMAND COMMA-SEPARATED
    for item in $(echo "$2" | tr , ' '); do "$1" "$item"; done
}

load_extra() { if [ -e "/lib/modules/$1.order" ]; then load "$1"; else echo "paravane: no modules for $1"; fi; }

await() { # DEVICE
    tries=0
    while [ ! -b "/dev/$1" ] && [ $tries -lt "${patience:-100}" ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
}

disk_test() { # DEVICE
    [ -b "/dev/$1" ] || return 0
    bytes=$((megabytes << 20))
    yes "paravane disktest $1" | head -c $bytes >/tmp/pattern
    wanted=$(sha256sum </tmp/pattern)
    dd if=/tmp/pattern of="/dev/$1" bs=64k conv=fsync 2>/dev/null || echo "disktest: $1 write failed"
    sync
    echo 3 >/proc/sys/vm/drop_caches
    cached=$(head -c $bytes "/dev/$1" | sha256sum)
    direct=$(dd if="/dev/$1" bs=64k count=$((bytes >> 16)) iflag=direct 2>/dev/null | sha256sum)
    verdict=same
    [ "$wanted" = "$cached" ] && [ "$wanted" = "$direct" ] || verdict=DIFFERENT
    echo "disktest: device=$1 bytes=$bytes written=${wanted%% *} read=${cached%% *} direct=${direct%% *} $verdict"
    rm /tmp/pattern
}

compare_disk() { # DEVICE
    [ -b "/dev/$1" ] || { echo "diskbench device=$1 missing"; return 0; }
    link=$(readlink -f "/sys/block/$1")
    driver=unknown
    while [ "$link" != / ]; do
        if [ -e "$link/driver" ]; then
            driver=$(basename "$(readlink "$link/driver")")
            case $driver in sd | virtio_blk) ;; *) break ;; esac
            [ "$driver" = virtio_blk ] && break
        fi
        link=$(dirname "$link")
    done
    echo "diskbench device=$1 driver=$driver"
    diskbench "/dev/$1" "$megabytes" "$operations" "$seed" || echo "diskbench device=$1 failed"
}

bench() {
    cd /bench || return
    set -f # the list holds words, not patterns
    while read -r name command; do
        $command </dev/null || echo "@@failed $name"
    done <list
    echo '@@done'
}

finish() { # poweroff|reboot|halt
    sync
    "$1" -f
    sleep 5
}

option modules ''
extra=$value
load default
each load_extra "$extra"
option run shell
run=$value
option wait ''
case $run in
disktest | compare) [ -n "$value" ] || { value=sda,vda; patience=20; } ;;
esac
each await "$value"
echo 'paravane: init reached'

case $run in
poweroff | reboot | halt) finish "$run" ;;
disktest)
    option megabytes 4
    megabytes=$value
    option disktest sda,vda
    each disk_test "$value"
    echo 'disktest: done'
    finish poweroff
    ;;
compare)
    option megabytes 32
    megabytes=$value
    option operations 2000
    operations=$value
    option seed 1
    seed=$value
    option compare sda,vda
    each compare_disk "$value"
    echo 'diskbench done'
    finish poweroff
    ;;
bench)
    bench
    finish poweroff
    ;;
shell) ;;
*) echo "paravane: pv.run=$run is unknown; here is a shell" ;;
esac
setsid cttyhack sh
finish poweroff
