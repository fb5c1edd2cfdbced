'use strict'
/** The store on disk: verify, collect, measure; and snapshots that leave and enter it as one file. */
const { createReadStream, createWriteStream } = require('node:fs')
const { mkdtemp, rm } = require('node:fs/promises')
const os = require('node:os')
const path = require('node:path')
const { pipeline } = require('node:stream/promises')
const { InvalidArgumentError } = require('./errors')
const { native, invoke, places } = require('./native')

/** Whatever takes as long as the disk does. */
const NO_TIMEOUT = 0

function checkString(value, what) {
  if (typeof value !== 'string' || value === '')
    throw new InvalidArgumentError(`${what} must be a non-empty string`)
  return value
}

/** Runs `body` with the name of a file that is gone afterwards. */
async function withFile(body) {
  const dir = await mkdtemp(path.join(os.tmpdir(), 'amberbox-move-'))
  try {
    return await body(path.join(dir, 'snapshot'))
  } finally {
    await rm(dir, { recursive: true, force: true })
  }
}

async function exportSnapshot(snapshotId, destination, opts) {
  checkString(snapshotId, 'snapshotId')
  const without = opts?.without ?? []
  if (!Array.isArray(without)) throw new InvalidArgumentError('without must be a list of ids of layers')
  const write = (file) =>
    invoke(
      (call) => native.exportSnapshot(places().home, snapshotId, file, without, call),
      opts,
      NO_TIMEOUT,
      // A file that nobody waits for any more.
      () => rm(file, { force: true }),
    )
  if (typeof destination === 'string') return write(path.resolve(destination))
  if (typeof destination?.write !== 'function') {
    throw new InvalidArgumentError('destination must be a path or a writable stream')
  }
  return withFile(async (file) => {
    const done = await write(file)
    await pipeline(createReadStream(file), destination, { signal: opts?.signal })
    return done
  })
}

async function importSnapshot(source, opts) {
  const read = (file) => invoke((call) => native.importSnapshot(places().home, file, call), opts, NO_TIMEOUT)
  if (typeof source === 'string') return read(path.resolve(checkString(source, 'source')))
  if (typeof source?.[Symbol.asyncIterator] !== 'function') {
    throw new InvalidArgumentError('source must be a path or a readable stream')
  }
  return withFile(async (file) => {
    await pipeline(source, createWriteStream(file, { mode: 0o600 }), { signal: opts?.signal })
    return read(file)
  })
}

/** The store of this process, as `AMBERBOX_HOME` says. */
const store = {
  async verify(opts) {
    return invoke((call) => native.verifyStore(places().home, call), opts, NO_TIMEOUT)
  },
  async gc(opts) {
    return invoke((call) => native.collectStore(places().home, call), opts, NO_TIMEOUT)
  },
  async du(opts) {
    return invoke((call) => native.storeUsage(places().home, call), opts, NO_TIMEOUT)
  },
  async layers(opts) {
    return invoke((call) => native.storeLayers(places().home, call), opts, NO_TIMEOUT)
  },
}

module.exports = { exportSnapshot, importSnapshot, store }
