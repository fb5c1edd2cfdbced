// KVM: our machine against QEMU's use of the same KVM: same kernel, same root file system, same work, in turn.
//
//   node bench/kvm.mjs --tool BOOT --kernel VMLINUX --disk ROOTFS [--rounds N] [--json FILE]
//
// Runs wherever /dev/kvm works: `npm run bench` on a host with real KVM, or in the outer guest of `npm run test:kvm`, where times say
// little but their ratios do. Exits are the kernel's own counters (debugfs, root); without them those rows are left out.

import { spawn } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createConnection } from 'node:net'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { bootQemu, haveQemu, machineArguments } from '../scripts/guest/qemu.mjs'

// Requests of one page each. Two numbers, so that what marks and pauses cost cancels out.
const FEW = 200
const MANY = 1200
const read = (count, skip) => `dd if=/dev/vda of=/dev/null bs=4096 iflag=direct count=${count} skip=${skip} 2>/dev/null`
// The pause lets the counters be read while nothing happens.
const REQUESTS = [read(50, 0), 'sleep 1', 'echo @@few', 'sleep 1', read(FEW, 1000), 'echo @@many', 'sleep 1', read(MANY, 5000), 'echo @@over', 'sleep 1'].join('; ')
const WORK = [
  'echo @@python',
  `python3 -c 'print(1)'`,
  'echo @@fork',
  'i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i+1)); done',
  'echo @@done',
].join('; ')
const TICK = 'i=0; while :; do i=$((i+1)); echo @@tick $i; sleep 0.1; done'

const COUNTERS = '/sys/kernel/debug/kvm'
/** The kernel's counters of all machines that exist now. */
function counters() {
  const value = (name) => Number(readFileSync(join(COUNTERS, name), 'utf8'))
  return { exits: value('exits'), toUser: value('mmio_exits') + value('io_exits'), halts: value('halt_exits'), interrupts: value('irq_injections') }
}
const haveCounters = () => existsSync(join(COUNTERS, 'exits'))

/** Runs a program; `onLine(text, seconds)` sees its standard output and may end it by returning true. Resolves with its standard error and seconds. */
function watch(command, args, options, onLine) {
  return new Promise((done, fail) => {
    const began = performance.now()
    const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'], ...options })
    let rest = ''
    let errors = ''
    child.stdout.setEncoding('utf8').on('data', (data) => {
      const now = (performance.now() - began) / 1000
      const lines = (rest + data).split(/\r*\n/)
      rest = lines.pop()
      for (const line of lines) if (onLine(line, now)) child.kill('SIGKILL')
    })
    child.stderr.on('data', (data) => (errors += data))
    child.on('error', fail)
    child.on('close', () => done({ errors, seconds: (performance.now() - began) / 1000 }))
  })
}

/** Notes when each mark arrives, and the counters then. */
function marker() {
  const marks = {}
  return {
    marks,
    take(text, seconds) {
      const name = /^@@(\w+)/.exec(text)?.[1]
      if (name) marks[name] ??= { seconds, ...(haveCounters() ? counters() : {}) }
    },
    need(...names) {
      const missing = names.filter((name) => !marks[name])
      if (missing.length > 0) throw new Error(`The guest did not come to its mark ${missing[0]}`)
    },
  }
}

/** The two contenders: whole runs with the seconds of the run, and restores with the seconds to the first sign of life. */
function contenders({ tool, kernel, disk }, dir) {
  const ours = (args, onLine) =>
    watch(tool, ['--backend', 'kvm', '--seconds', '300', ...args], {}, (line, seconds) => onLine(line.replace(/^\s*[\d.]+ /, ''), seconds))
  const fresh = ['--kernel', kernel, '--rootfs', disk, '--params', 'quiet']
  const script = (text) => ['--init', `/bin/bash -- -c "mount -t proc proc /proc; ${text}"`]
  const qemuState = join(dir, 'qemu.state')
  const qemuArgs = () => machineArguments({ kernel, disk, script: TICK, dir, accel: 'kvm' })
  const store = join(dir, 'store')
  let snapshot
  return {
    Amberbox: {
      boot: async () => (await ours([...fresh, '--init', '/bin/true'], () => {})).seconds,
      work: async (text, onLine) => void (await ours([...fresh, ...script(text)], onLine)),
      freeze: async () => {
        // Late enough for the guest to tick on any machine.
        const { errors } = await ours([...fresh, ...script(TICK), '--store', store, '--capture', '10', '--seconds', '14'], () => false)
        snapshot = /\[snapshot (\w+):/.exec(errors)?.[1]
        if (!snapshot) throw new Error(`No snapshot was taken:\n${errors}`)
      },
      restore: async () => {
        let first
        await ours(['--store', store, '--restore', snapshot], (line, seconds) => {
          if (!line.startsWith('@@tick')) return false
          first ??= seconds
          return true
        })
        return first
      },
    },
    QEMU: {
      boot: async () => (await bootQemu({ kernel, disk, accel: 'kvm', script: '', append: 'init=/bin/true' })).seconds,
      work: async (text, onLine) => void (await bootQemu({ kernel, disk, accel: 'kvm', script: text, onLine })),
      freeze: () => freezeQemu(qemuArgs(), dir, qemuState),
      restore: async () => {
        let first
        await watch('qemu-system-x86_64', [...qemuArgs(), '-incoming', `exec:cat ${qemuState}`], { env: { ...process.env, TMPDIR: dir } }, (line, seconds) => {
          if (!line.startsWith('@@tick')) return false
          first ??= seconds
          return true
        })
        return first
      },
    },
  }
}

/** Boots QEMU until its guest ticks, and writes the machine's state to a file. */
async function freezeQemu(args, dir, file) {
  const path = join(dir, 'qmp')
  let ticking
  const started = new Promise((done) => (ticking = done))
  const over = watch('qemu-system-x86_64', [...args, '-qmp', `unix:${path},server=on,wait=off`], { env: { ...process.env, TMPDIR: dir } }, (line) => {
    if (line.startsWith('@@tick 10')) ticking()
    return false
  })
  await Promise.race([started, over.then(({ errors }) => Promise.reject(new Error(`QEMU ended: ${errors}`)))])
  const socket = createConnection(path).setEncoding('utf8')
  const waiting = []
  let rest = ''
  socket.on('data', (data) => {
    const lines = (rest + data).split('\n')
    rest = lines.pop()
    for (const line of lines) {
      const message = JSON.parse(line)
      if ('return' in message || 'error' in message) waiting.shift()?.(message)
    }
  })
  const ask = (execute, options) =>
    new Promise((done) => {
      waiting.push(done)
      socket.write(`${JSON.stringify({ execute, arguments: options })}\n`)
    })
  await ask('qmp_capabilities')
  await ask('migrate', { uri: `exec:cat > ${file}` })
  for (;;) {
    const { return: state, error } = await ask('query-migrate')
    if (error || state.status === 'failed') throw new Error(`QEMU cannot save its state: ${JSON.stringify(error ?? state)}`)
    if (state.status === 'completed') break
    await new Promise((done) => setTimeout(done, 100))
  }
  // It may end before it has read everything.
  socket.on('error', () => {})
  socket.write(`${JSON.stringify({ execute: 'quit' })}\n`)
  await over
  socket.destroy()
}

/** Measures one contender once: figures by name. */
async function round(contender) {
  const figures = { 'kernel boot to the end of init, s': await contender.boot() }
  const { marks, take, need } = marker()
  await contender.work(`${WORK}; ${haveCounters() ? REQUESTS : ''}`, take)
  need('python', 'fork', 'done')
  figures['kernel boot to the first command, s'] = marks.python.seconds
  figures['python3 start, first, s'] = marks.fork.seconds - marks.python.seconds
  figures['200 x fork+exec, s'] = marks.done.seconds - marks.fork.seconds
  if (haveCounters()) {
    need('few', 'many', 'over')
    const each = (name) => (marks.over[name] - marks.many[name] - (marks.many[name] - marks.few[name])) / (MANY - FEW)
    figures['exits per disk request'] = each('exits')
    figures['... of them to user space'] = each('toUser')
    figures['... of them HLT'] = each('halts')
    figures['exits from power-on to the first command'] = marks.python.exits
  }
  figures['restore to the first sign of life, s'] = await contender.restore()
  return figures
}

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)]

/** Measures both in turn and prints the table; returns its rows. */
export async function kvmBench({ tool, kernel, disk, rounds = 3, print = (text) => process.stdout.write(`${text}\n`) }) {
  if (!haveQemu()) throw new Error('QEMU is missing. Run: apt-get install -y --no-install-recommends qemu-system-x86')
  const dir = mkdtempSync(join(process.env.TMPDIR ?? tmpdir(), 'amberbox-kvm-bench-'))
  try {
    mkdirSync(join(dir, 'store'))
    const all = contenders({ tool, kernel, disk }, dir)
    const measured = Object.fromEntries(Object.keys(all).map((name) => [name, []]))
    for (const contender of Object.values(all)) await contender.freeze()
    for (let i = 0; i < rounds; i++) {
      for (const [name, contender] of Object.entries(all)) {
        measured[name].push(await round(contender))
        print(`  round ${i + 1} of ${rounds}: ${name} done`)
      }
    }
    const rows = Object.keys(measured.Amberbox[0]).map((name) => {
      const [ours, theirs] = ['Amberbox', 'QEMU'].map((who) => measured[who].map((figures) => figures[name]))
      return { name, ours: median(ours), theirs: median(theirs), ratio: median(ours.map((value, i) => value / theirs[i])) }
    })
    print(`${`median of ${rounds} rounds in turn`.padEnd(44)}   Amberbox       QEMU      ratio`)
    for (const { name, ours, theirs, ratio } of rows) {
      print(`${name.padEnd(44)} ${ours.toFixed(2).padStart(10)} ${theirs.toFixed(2).padStart(10)} ${ratio.toFixed(2).padStart(10)}`)
    }
    return rows
  } finally {
    rmSync(dir, { recursive: true, force: true })
  }
}

if (process.argv[1] && resolve(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const options = Object.fromEntries(['tool', 'kernel', 'disk', 'rounds', 'json'].map((name) => [name, { type: 'string' }]))
  const { values } = parseArgs({ options })
  const rows = await kvmBench({ ...values, rounds: Number(values.rounds ?? 3) })
  if (values.json) writeFileSync(values.json, JSON.stringify(rows, null, 2))
}
