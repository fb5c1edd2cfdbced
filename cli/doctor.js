'use strict'
/**
 * `amberbox doctor`: what this host has, what the probe of KVM did and found, whether a sandbox really runs, and what would
 * make it faster. Nothing is taken from earlier verdicts: all is looked at now.
 */
const { existsSync, readFileSync, realpathSync, statfsSync, statSync } = require('node:fs')
const os = require('node:os')
const path = require('node:path')

const DEVICE = '/dev/kvm'

const summary = 'says which backend sandboxes use here and why, and tries one'
const usage = `Usage: amberbox doctor [--json] [--device PATH]

Says what the host has, probes KVM, and creates a sandbox to see that one runs.

  --json         all of it as one JSON object
  --device PATH  probe this instead of ${DEVICE}

Exit code 0 if sandboxes can run, 1 if they cannot.
`
const options = { json: { type: 'boolean', default: false }, device: { type: 'string' } }

/** The device file: what it is, whose it is. */
function deviceFile(device) {
  let stat
  try {
    stat = statSync(device)
  } catch (error) {
    return { path: device, exists: false, error: error.code }
  }
  const major = Math.floor(stat.rdev / 256) & 0xfff
  const minor = stat.rdev & 0xff
  const kind = stat.isCharacterDevice() ? `character device ${major}:${minor}` : 'not a character device'
  return {
    path: device,
    exists: true,
    kind,
    mode: (stat.mode & 0o7777).toString(8),
    owner: stat.uid,
    group: nameOfGroup(stat.gid),
  }
}

function nameOfGroup(gid) {
  try {
    const line = readFileSync('/etc/group', 'utf8')
      .split('\n')
      .find((entry) => entry.split(':')[2] === String(gid))
    return line ? line.split(':')[0] : String(gid)
  } catch {
    return String(gid)
  }
}

/** What the host's CPU says about virtualization. */
function processor() {
  const text = existsSync('/proc/cpuinfo') ? readFileSync('/proc/cpuinfo', 'utf8') : ''
  const flags = new Set((/^flags\s*: (.*)$/m.exec(text)?.[1] ?? '').split(' '))
  return {
    model: /^model name\s*: (.*)$/m.exec(text)?.[1] ?? 'unknown',
    cpus: os.availableParallelism(),
    virtualization: flags.has('vmx') ? 'vmx' : flags.has('svm') ? 'svm' : null,
    hypervisor: flags.has('hypervisor'),
  }
}

/** Bytes free for processes without privileges where `dir` is or will be, and for a store that is there, its size. */
function storePlace(dir) {
  let parent = dir
  while (!existsSync(parent)) parent = path.dirname(parent)
  const { bavail, bsize } = statfsSync(parent)
  return { path: dir, exists: existsSync(dir), freeBytes: bavail * bsize }
}

function templatePlace(dirs) {
  for (const dir of dirs) {
    try {
      return { path: realpathSync(path.join(dir, 'template')), searched: dirs }
    } catch {
      // not there
    }
  }
  return { path: null, searched: dirs }
}

/** Bytes of memory that programs can still have. */
function memory() {
  const available = /^MemAvailable:\s+(\d+) kB$/m.exec(readFileSync('/proc/meminfo', 'utf8'))?.[1]
  return { totalBytes: os.totalmem(), availableBytes: available ? Number(available) * 1024 : os.freemem() }
}

/** Creates a sandbox and runs a command in it. */
async function trial({ Sandbox }) {
  const began = performance.now()
  const since = (start) => Math.round(performance.now() - start)
  let sandbox
  try {
    sandbox = await Sandbox.create({ timeoutMs: 120_000, metadata: { purpose: 'amberbox doctor' } })
    const createMs = since(began)
    const asked = performance.now()
    const { stdout } = await sandbox.commands.run('echo $((6 * 7))')
    const commandMs = since(asked)
    if (stdout !== '42\n') throw new Error(`The sandbox answered ${JSON.stringify(stdout)}`)
    const { backend, backendReason } = await sandbox.getInfo()
    return { ok: true, backend, backendReason, createMs, commandMs }
  } catch (error) {
    return { ok: false, code: error.code, error: error.message }
  } finally {
    await sandbox?.kill().catch(() => {})
  }
}

/** What to do for KVM, by the probe's verdict. Each is a sentence. */
function advice(kvm, file, cpu, override) {
  const nested =
    'This host is a virtual machine. Sandboxes are fastest on bare metal, or where the hypervisor passes hardware virtualization ' +
    'on ("nested virtualization": a setting of the virtual machine or of the instance type).'
  const lines = []
  switch (kvm.verdict) {
    case 'usable':
      break
    case 'missing':
      if (cpu.virtualization) {
        const module = cpu.virtualization === 'vmx' ? 'kvm_intel' : 'kvm_amd'
        lines.push(`Load KVM: sudo modprobe ${module}`)
        lines.push(`In a container, hand the host's device in: docker run --device ${DEVICE} ...`)
      } else if (cpu.hypervisor) lines.push(nested)
      else
        lines.push(
          "The CPU offers no virtualization: enable it (VT-x or AMD-V) in the machine's firmware set-up.",
        )
      break
    case 'forbidden':
      lines.push(
        `Get permission, then log in again: sudo usermod --append --groups ${file.group ?? 'kvm'} ${userName()}`,
      )
      lines.push(
        `In a container, join the group: docker run --device ${DEVICE} --group-add ${file.group ?? 'kvm'} ...`,
      )
      break
    case 'notkvm':
      lines.push(
        `${file.path} is ${file.kind ?? 'something else'}: KVM's is a character device, usually 10:232. Look at what made it.`,
      )
      break
    case 'refused':
      if (cpu.hypervisor && !cpu.virtualization) lines.push(nested)
      else
        lines.push(
          'KVM is there and does not work; the reason above is its own. Usual causes: virtualization is off in the firmware, or another hypervisor has it.',
        )
      break
    case 'host':
      lines.push('KVM on this processor cannot run x86-64 guests.')
      break
    default:
      lines.push(nested)
      lines.push('To try KVM all the same: AMBERBOX_BACKEND=kvm')
  }
  if (override === 'soft' && kvm.verdict === 'usable')
    lines.push('KVM works here, but AMBERBOX_BACKEND=soft is set: unset it.')
  return lines
}

function userName() {
  try {
    return os.userInfo().username
  } catch {
    return '$USER'
  }
}

async function examine(device) {
  const report = {
    ok: false,
    versions: {
      amberbox: require('../package.json').version,
      node: process.versions.node,
      kernel: os.release(),
      glibc: process.report?.getReport?.()?.header?.glibcVersionRuntime ?? null,
      platform: `${process.platform}-${process.arch}`,
    },
    cpu: processor(),
    memory: memory(),
  }
  let layer
  try {
    layer = require('../lib/native')
  } catch (error) {
    return { ...report, addon: { error: error.message }, advice: [] }
  }
  const { home, guest } = layer.places()
  const { verdict, detail, roundNs, steps, ms, backend, reason } = await layer.native.diagnose(device, home, {
    token: 0,
    timeoutMs: 0,
  })

  const file = deviceFile(device ?? DEVICE)
  const kvm = { device: file, verdict, detail, roundNs: roundNs ?? null, steps, ms }
  const override = process.env.AMBERBOX_BACKEND || null
  const tried = await trial(require('../index.js'))
  return {
    ...report,
    ok: tried.ok,
    addon: { version: layer.native.version() },
    override,
    backend: backend ?? null,
    reason,
    kvm,
    template: templatePlace(guest),
    store: storePlace(home),
    trial: tried,
    advice: advice(kvm, file, report.cpu, override),
  }
}

const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`
const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(2) : ms.toFixed(0)} ms`

/** The report for people. */
function text(report) {
  const { versions, cpu, memory: ram } = report
  const lines = []
  const line = (name, value) => lines.push(`${name.padEnd(11)} ${value}`)
  line(
    'versions',
    `amberbox ${versions.amberbox}, Node ${versions.node}, Linux ${versions.kernel}, glibc ${versions.glibc ?? 'unknown'}, ${versions.platform}`,
  )
  const virtualization = cpu.virtualization ? `offers ${cpu.virtualization}` : 'offers no virtualization'
  line(
    'processor',
    `${cpu.cpus} x ${cpu.model}, ${virtualization}${cpu.hypervisor ? '; this is a virtual machine' : ''}`,
  )
  line('memory', `${gigabytes(ram.availableBytes)} available of ${gigabytes(ram.totalBytes)}`)
  if (report.addon.error) {
    line('addon', report.addon.error)
    return [...lines, '', 'Sandboxes cannot run: the addon cannot be loaded.', ''].join('\n')
  }
  const { kvm, trial: tried, template, store } = report
  const { device } = kvm
  line(
    device.path,
    device.exists
      ? `${device.kind}, mode ${device.mode}, group ${device.group}`
      : `not there (${device.error})`,
  )
  const steps = kvm.steps.map((step) => `${step.name} ${milliseconds(step.ms)}`)
  line('probe', [...steps, `in all ${milliseconds(kvm.ms)}`].join(', '))
  line('', `${kvm.verdict}: ${kvm.detail}`)
  line('backend', report.backend ? report.reason : `none: ${report.reason}`)
  line('template', template.path ?? `none in ${template.searched.join(', ')}`)
  line('store', `${store.path}${store.exists ? '' : ' (not there yet)'}, ${gigabytes(store.freeBytes)} free`)
  line(
    'trial',
    tried.ok
      ? `a sandbox was there after ${tried.createMs} ms (${tried.backend}), a command took ${tried.commandMs} ms`
      : `failed: ${tried.error}`,
  )
  lines.push('', tried.ok ? 'Sandboxes can run.' : 'Sandboxes cannot run.')
  if (report.advice.length > 0)
    lines.push('For a faster backend:', ...report.advice.map((sentence) => `- ${sentence}`))
  return [...lines, ''].join('\n')
}

async function run({ json, device }) {
  const report = await examine(device)
  process.stdout.write(json ? `${JSON.stringify(report, null, 2)}\n` : text(report))
  return report.ok ? 0 : 1
}

module.exports = { summary, usage, options, run, advice }
