// The outer guest: a machine with AMD-V, all of it emulated by QEMU, in which `/dev/kvm` works on any host. It runs a plan
// (steps with a name, a limit and a command) and ends. Its console is shown line by line while it runs.

import { spawn } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { heading, ScriptError } from '../progress.mjs'

/** Packages that must be installed. */
export const PACKAGES = ['binutils', 'e2fsprogs', 'qemu-system-x86', 'util-linux']
/** From power-on to the first step: measured 8 s with both host cores busy with other work. */
const BOOT_SECONDS = 120
/** What a failure repeats of the console. */
const TAIL = 30

/**
 * Runs `plan` (`[{ name, seconds, command }]`) in the outer guest and shows what happens.
 *
 * `files`: `{ vmlinuz, initrd, root, payload }`, none of which is changed; `directory`: the host's, at /mnt/host in the guest;
 * `log` gets all of the console. Resolves to `results`, the plan with `code` (null: it did not come to its end) and `took`
 * (seconds), and `died`: how the outer guest's own kernel ended, if it did. No guest of KVM can do that to a kernel; the
 * emulation of AMD-V can (QEMU 7.2 now and then loses the host's registers over a #VMEXIT, most often with two threads, hence one CPU).
 */
export async function runOuter({ files, directory, plan, log, cpus = 1, memoryMiB = 4096 }) {
  writeFileSync(
    join(directory, 'plan'),
    plan.map((step) => `${step.name}\n${step.seconds}\n${step.command}\n`).join(''),
  )
  const results = plan.map((step) => ({ ...step, code: null, took: null }))
  const began = performance.now()
  const now = () => (performance.now() - began) / 1000
  const console = []
  let current
  let failure
  let done = false

  const take = (text) => {
    console.push(`${now().toFixed(1).padStart(7)}  ${text}`)
    const [, verb, rest] = /^@@rig (\w+) ?(.*)$/.exec(text) ?? []
    if (verb === 'begin') {
      current = results.find((step) => step.name === rest)
      current.took = now()
      heading(`  --- ${rest} (limit ${current.seconds} s)`)
    } else if (verb === 'end') {
      current.code = Number(rest.split(' ')[0])
      current.took = now() - current.took
      heading(`  --- ${current.name}: ${outcome(current)} after ${current.took.toFixed(1)} s`)
    } else if (verb === 'failed') {
      failure = rest
    } else if (verb === 'done') {
      done = true
    } else {
      heading(`  ${now().toFixed(1).padStart(7)} | ${text}`)
    }
  }

  const limit = BOOT_SECONDS + plan.reduce((sum, step) => sum + step.seconds + 15, 0)
  const ended = await qemu(files, directory, { cpus, memoryMiB, limit }, take)
  writeFileSync(log, `${console.join('\n')}\n${ended.errors}`)
  if (done) return { results }
  const tail = console.slice(-TAIL).map((line) => `  | ${line}`)
  const story = (why) => `${why}\n${tail.join('\n')}\nAll of its console: ${log}`
  const panic = console.find((text) => text.includes('Kernel panic - not syncing'))
  if (panic && !failure && !ended.late) return { results, died: story(panic.trim()) }
  const why =
    failure ??
    (ended.late ? `it was still running after ${limit} s` : `it ended early: ${ended.errors.trim()}`)
  throw new ScriptError(story(`The outer guest did not finish: ${why}`))
}

/** How a step ended, in words. */
export function outcome({ code, seconds }) {
  if (code === 0) return 'passed'
  if (code === null) return 'not run'
  return code === 124 || code === 137 ? `stopped at its limit of ${seconds} s` : `failed (exit code ${code})`
}

function qemu(files, directory, { cpus, memoryMiB, limit }, onLine) {
  const disk = (name, file) => [
    '-drive',
    `id=${name},file=${file},format=raw,if=none,snapshot=on,cache=unsafe`,
    '-device',
    `virtio-blk-pci,drive=${name}`,
  ]
  const args = [
    ...['-M', 'q35', '-accel', 'tcg,thread=multi', '-cpu', 'max,+svm,+npt'],
    ...['-smp', `${cpus}`, '-m', `${memoryMiB}`],
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot', '-serial', 'stdio'],
    ...['-kernel', files.vmlinuz, '-initrd', files.initrd],
    // The TSC is the host's: KVM gives its guests a stable clock only above a stable one.
    ...['-append', 'console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable'],
    ...disk('root', files.root),
    ...disk('payload', files.payload),
    '-virtfs',
    `local,path=${directory},mount_tag=host,security_model=none,id=host`,
    ...['-device', 'virtio-rng-pci'],
  ]
  return new Promise((resolve, reject) => {
    // The kernel ends it if this process is killed. TMPDIR: where QEMU keeps what is written to the disks.
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', 'qemu-system-x86_64', ...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, TMPDIR: directory },
    })
    let rest = ''
    let errors = ''
    let late = false
    child.stdout.setEncoding('utf8').on('data', (data) => {
      const lines = (rest + data).split(/\r*\n/)
      rest = lines.pop()
      lines.forEach(onLine)
    })
    child.stderr.setEncoding('utf8').on('data', (data) => (errors += data))
    const stop = () => child.kill('SIGKILL')
    const deadline = setTimeout(() => {
      late = true
      stop()
    }, limit * 1000)
    process.once('exit', stop)
    const finish = (settle) => {
      clearTimeout(deadline)
      process.off('exit', stop)
      settle()
    }
    child.on('error', (error) =>
      finish(() => reject(new ScriptError(`Cannot run setpriv (package util-linux): ${error.message}`))),
    )
    child.on('close', () =>
      finish(() => {
        if (rest) onLine(rest)
        resolve({ errors, late })
      }),
    )
  })
}
